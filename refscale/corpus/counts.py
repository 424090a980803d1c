"""The corpus' bookkeeping: every row that was read ends in exactly one place.

    read = quarantined + unused + duplicates + contradictions_dropped + kept

Counts of parts add up to the counts of the whole, so that tasks return theirs and the driver sums.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from refscale.errors import CorpusError, SchemaError, TooManyRefusedError


@dataclass(frozen=True)
class Counts:
    """Rows of a corpus, or of a part of it.

    Attributes:
        read: Rows of the sources, blank lines left out.
        quarantined: Refused rows by reason, a code of corpus.REASONS.
        unused: Pairs that a source's weight leaves out.
        duplicates: Pairs dropped because an earlier one is equal.
        contradictions: Pairs that also occur with sides swapped, dropped or not.
        contradictions_dropped: Those dropped for it.
        kept: Pairs in the corpus.
        holdout: Kept pairs that are evaluated on and not trained on.
        truncated: Kept pairs of which a side was cut to encoding.max_length.
        boundary_shifted: Kept pairs whose tokenised prompt is no prefix of prompt + completion.
        tokens: Tokens of prompt, chosen and rejected of the kept pairs.
    """

    read: int = 0
    quarantined: Mapping[str, int] = field(default_factory=dict)
    unused: int = 0
    duplicates: int = 0
    contradictions: int = 0
    contradictions_dropped: int = 0
    kept: int = 0
    holdout: int = 0
    truncated: int = 0
    boundary_shifted: int = 0
    tokens: int = 0

    @property
    def refused(self) -> int:
        """Rows in quarantine."""
        return sum(self.quarantined.values())

    @classmethod
    def total(cls, parts: Iterable[Mapping[str, Any]]) -> "Counts":
        """The sum of what `as_dict` gave; a missing name counts as nothing."""
        numbers: dict[str, int] = {f.name: 0 for f in fields(cls) if f.name != "quarantined"}
        reasons: dict[str, int] = {}
        for part in parts:
            for name in numbers:
                numbers[name] += part.get(name, 0)
            for reason, count in part.get("quarantined", {}).items():
                reasons[reason] = reasons.get(reason, 0) + count
        # The same order whatever the order of the parts: counts are compared as JSON.
        ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        return cls(quarantined=dict(ordered), **numbers)

    def as_dict(self) -> dict[str, Any]:
        """JSON values by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "quarantined": dict(self.quarantined)}

    def as_funnel(self) -> dict[str, int]:
        """What became of the rows, in the order in which it happens, for people."""
        return {
            "read": self.read,
            **{f"refused: {reason}": count for reason, count in self.quarantined.items()},
            "left out by weight": self.unused,
            "duplicates dropped": self.duplicates,
            "contradictions dropped": self.contradictions_dropped,
            "kept": self.kept,
            "  of them holdout": self.holdout,
            "  of them cut to max_length": self.truncated,
            "  of them with a shifted boundary": self.boundary_shifted,
            "  of them contradictory": self.contradictions - self.contradictions_dropped,
            "tokens": self.tokens,
        }

    def check(self) -> None:
        """Every row is accounted for.

        Raises:
            SchemaError: It is not; this is a defect of refscale.
        """
        placed = self.refused + self.unused + self.duplicates + self.contradictions_dropped
        if self.read != placed + self.kept:
            raise SchemaError(
                f"the corpus' counts do not add up: read {self.read}, kept {self.kept}, refused"
                f" {self.refused}, left out by weight {self.unused}, duplicates"
                f" {self.duplicates}, contradictions dropped {self.contradictions_dropped}"
            )


def require_kept(counts: Counts) -> None:
    """End a run that has nothing to go on with.

    Raises:
        CorpusError: No pair is kept.
    """
    if not counts.kept:
        raise CorpusError(
            f"no pair is left of the {counts.read:,} rows: {counts.refused:,} were refused,"
            f" {counts.unused:,} left out by weight, {counts.contradictions_dropped:,} dropped as"
            " contradictions; mend the rows or change the corpus section"
        )


def check_refused(counts: Counts, max_bad_fraction: float, uri: str | None = None) -> None:
    """End a run whose corpus is mostly not what it seems to be.

    Args:
        counts: After reading.
        max_bad_fraction: The largest share of refused rows that is fine.
        uri: The run folder, if there is one.

    Raises:
        TooManyRefusedError: More were refused; the message names the top reasons.
    """
    if not counts.read or counts.refused <= max_bad_fraction * counts.read:
        return
    top = ", ".join(f"{reason} {count:,}" for reason, count in list(counts.quarantined.items())[:4])
    where = f"see {uri}/quarantine" if uri else "they are listed above"
    # A limit of the config, not a defect of the rows, has another way out.
    mend = "raise encoding.max_length" if "too_long" in top.partition(" ")[0] else "mend the rows"
    raise TooManyRefusedError(
        f"{counts.refused:,} of {counts.read:,} rows ({counts.refused / counts.read:.1%}) were"
        f" refused, corpus.max_bad_fraction is {max_bad_fraction:g}: {top}; {where}, then {mend}"
        " or raise corpus.max_bad_fraction"
    )
