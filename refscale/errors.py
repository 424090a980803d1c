"""Every error that refscale raises on purpose, in one tree.

Each message says what was wrong, the value seen, the rule and the way out, in one line, because the
command line prints it alone, without a traceback. One message argument each, so that they pickle
across Ray workers. ``exit_code`` is what the command line ends with.
"""


class RefscaleError(Exception):
    """Root of the tree: the run failed for a reason that its user can act on."""

    exit_code = 1


class ConfigError(RefscaleError):
    """The config, an override or the command line is wrong."""

    exit_code = 2


class CorpusError(RefscaleError):
    """A source cannot be read at all: missing, empty, of an unknown format or shape."""

    exit_code = 2


class TooManyRefusedError(RefscaleError):
    """More of the corpus was refused than ``corpus.max_bad_fraction`` allows."""

    exit_code = 3


class SchemaError(RefscaleError):
    """A table lacks a column, has one of the wrong type, or its counts do not add up."""


class StorageError(RefscaleError):
    """A run folder cannot be read or written, or a file in it is damaged."""


class RunLockedError(StorageError):
    """Another driver is working on the run folder."""


class FingerprintError(RefscaleError):
    """A stage was done with other settings than those of this run; the message names the field."""


class ModelError(RefscaleError):
    """A model or tokenizer cannot be loaded or cannot do what the config asks of it."""


class ScoringError(RefscaleError):
    """Log-probabilities could not be computed or are not finite."""


class SelectionError(RefscaleError):
    """A selection is impossible as asked, for example more pairs than there are."""


class TrainingError(RefscaleError):
    """Training cannot start or broke off; the message names the likely cause."""


class EvaluationError(RefscaleError):
    """The policy or its evaluation data cannot be evaluated."""
