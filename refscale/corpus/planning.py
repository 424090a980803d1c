"""Config -> plan of the corpus: units to read, shapes, encoder, fingerprint.

Costs: the files are hashed (remembered between runs), big json lines files are read once to find
line starts, the first rows of each source are looked at, and the tokenizer is loaded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

from refscale.config import Config, CorpusConfig, ModelConfig, Source
from refscale.config_file import explain_model_name
from refscale.corpus.encoding import EncoderSettings, tokenizer_fingerprint
from refscale.corpus.pairs import Pair, Refusal
from refscale.corpus.reading import Row, read_rows
from refscale.corpus.shapes import canonical_pair, detect_shape
from refscale.corpus.sources import LocatedSource, Unit, contents, locate, plan_units, unit_bytes
from refscale.errors import CorpusError, ModelError, StorageError
from refscale.lineage import pinned
from refscale.storage.fingerprints import digest

# Raised when the same rows would be prepared to other bytes: a run made before is then refused.
CODE_VERSION = 3
_SAMPLE_ROWS = 64


@dataclass(frozen=True)
class SourceSettings:
    """How the rows of one source are read."""

    name: str
    shape: str
    columns: Mapping[str, str] | None
    weight: float
    holdout: bool | None


@dataclass(frozen=True)
class Plan:
    """Everything that preparing needs to know; picklable.

    Attributes:
        units: Read units in corpus order.
        sources: By index.
        encoder: How to build the encoder.
        fingerprint: Everything that changes the corpus, by name.
        said: One line per source, for the user.
    """

    units: tuple[Unit, ...]
    sources: tuple[SourceSettings, ...]
    encoder: EncoderSettings
    fingerprint: dict[str, Any]
    said: list[str]
    duplicates: str
    contradictions: str
    shard_pairs: int
    holdout_fraction: float
    allow_empty: bool
    max_row_bytes: int
    seed: int


def plan(config: Config, before: Mapping[str, Any] | None = None) -> Plan:
    """Find the sources, their shapes and their units, and check the tokenizer against them.

    Args:
        config: The config.
        before: Fingerprint of the corpus that an earlier command began. The tokenizer and the hub
            datasets that the config does not pin stay at its commits, whatever was pushed since.

    Raises:
        CorpusError: A source is missing, empty, of an unknown format or shape.
        ModelError: The tokenizer cannot be loaded, or cannot encode what the sources hold.
    """
    corpus, before = config.corpus, before or {}
    revision = _tokenizer_revision(config.model, before.get("tokenizer"))
    settings = EncoderSettings.of(config, revision)
    pinned_sources = _at_commits(corpus.sources, before.get("sources", ()))
    located = _named([locate(source, i) for i, source in enumerate(pinned_sources)])
    wanted = unit_bytes(sum(found.num_bytes for found in located))
    units: list[Unit] = []
    sources, said, kinds = [], [], set()
    for source, found in zip(corpus.sources, located, strict=True):
        planned = plan_units(found, wanted, source.max_rows)
        shape, line, seen = _look_at(source, found, planned, corpus)
        units += planned
        kinds |= seen
        said.append(line)
        sources.append(
            SourceSettings(found.name, shape, source.columns, source.weight, source.holdout)
        )
    _check_tokenizer(settings, kinds)
    return Plan(
        units=tuple(units),
        sources=tuple(sources),
        encoder=settings,
        fingerprint=_fingerprint(config, located, sources, settings),
        said=said,
        duplicates=corpus.duplicates,
        contradictions=corpus.contradictions,
        shard_pairs=corpus.shard_pairs,
        holdout_fraction=corpus.holdout_fraction,
        allow_empty=corpus.allow_empty_completion,
        max_row_bytes=corpus.max_row_bytes,
        seed=corpus.seed,
    )


def asked(config: Config) -> str:
    """Digest of what the config says of the corpus; the contents of what it names decide the rest.

    A finished corpus keeps it, for `unchanged`.
    """
    names = {"model_name_or_path", "revision", "trust_remote_code", "chat_template"}
    return digest(
        [
            config.model.model_dump(include=names),
            config.corpus.model_dump(exclude={"max_bad_fraction"}),
            config.encoding.model_dump(),
            CODE_VERSION,
        ]
    )


def unchanged(config: Config, manifest: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The fingerprint of a finished corpus that is what the config asks for; else None: plan it.

    Files are hashed as in `plan`. Of hub datasets the commit is enough: a finished corpus needs
    neither the hub nor this machine's cache of it.

    Raises:
        CorpusError: A source is missing.
        ModelError: The tokenizer is not there.
    """
    if manifest is None or manifest.get("details", {}).get("asked") != asked(config):
        return None
    before = dict(manifest["fingerprint"])
    for i, (source, had) in enumerate(zip(config.corpus.sources, before["sources"], strict=True)):
        commit = had["contents"].get("commit") if source.dataset is not None else None
        known = commit is not None and source.revision in (None, commit)
        if not known and contents(locate(source, i)) != had["contents"]:
            return None
    revision = _tokenizer_revision(config.model, before["tokenizer"])
    tokenizer = tokenizer_fingerprint(EncoderSettings.of(config, revision))
    return before if tokenizer == before["tokenizer"] else None


def _at_commits(sources: Sequence[Source], before: Sequence[Mapping[str, Any]]) -> list[Source]:
    """The sources, with hub datasets that are not pinned at the commits that `before` has."""
    commits = [(had.get("dataset"), had.get("contents", {}).get("commit")) for had in before]
    # Of a begun corpus whose config had fewer sources, of which `begin` will say what differs.
    commits += [(None, None)] * (len(sources) - len(commits))
    return [
        source.model_copy(update={"revision": commit})
        if commit and source.revision is None and source.dataset == dataset
        else source
        for source, (dataset, commit) in zip(sources, commits, strict=False)
    ]


def _tokenizer_revision(model: ModelConfig, before: Mapping[str, str] | None) -> str | None:
    name = model.model_name_or_path
    try:
        return pinned(name, model.revision, before)
    except StorageError as exc:
        error = f"the tokenizer of model.model_name_or_path = {name} cannot be loaded: {exc}"
        raise ModelError(explain_model_name(name, error)) from exc


def _named(located: list[LocatedSource]) -> list[LocatedSource]:
    """The sources with names of their own: reports and per-source selection tell them apart."""
    own = {found.name for found in located}
    taken: set[str] = set()
    named = []
    for found in located:
        name = found.name
        numbered = (f"{found.name}-{i}" for i in count(2))
        while name in taken or (name != found.name and name in own):
            name = next(numbered)
        taken.add(name)
        named.append(replace(found, name=name))
    return named


def _look_at(
    source: Source, found: LocatedSource, units: list[Unit], corpus: CorpusConfig
) -> tuple[str, str, set[str]]:
    """Shape of a source, the line to say about it, and which of chat and text its pairs are."""
    where = f"corpus.sources.{found.index} ({found.root})"
    rows = list(islice(_unit_rows(units, corpus.max_row_bytes), _SAMPLE_ROWS))
    if not rows:
        raise CorpusError(f"{where} has no rows; check the file or leave the source out")
    values = [value for _, value, _ in rows]
    first_line = rows[0][2]
    objects = any(isinstance(value, dict) for value in values)
    if first_line is not None and first_line.startswith(b"[") and not objects:
        raise CorpusError(
            f"{where} begins like a JSON array, not like a line of json lines; rename it to .json"
        )
    readable = [value for value in values if not isinstance(value, Refusal)]
    if not readable:
        refusal = values[0]
        raise CorpusError(
            f"{where}: none of its first {len(values)} rows can be read; row {rows[0][0]}:"
            f" {refusal.reason}: {refusal.detail}"
        )
    if source.format == "auto" and source.columns:
        shape, evidence = "columns", "named by columns"
    elif source.format == "auto":
        shape, evidence = detect_shape(readable, where)
        evidence = f"detected in {evidence}"
    else:
        shape, evidence = source.format, "named by format"
    pairs = [
        pair
        for value in readable
        if isinstance(pair := canonical_pair(value, shape, source.columns), Pair)
    ]
    kinds = {"chat" if pair.conversational else "text" for pair in pairs}
    files = f"{len(found.files)} file{'s' * (len(found.files) != 1)}"
    what = f"dataset {found.dataset}" if found.dataset else files
    line = f"{found.name}: {what}, shape {shape} ({evidence}), {' and '.join(sorted(kinds))} pairs"
    return shape, line if kinds else f"{line.removesuffix(' pairs')}no pair in the sample", kinds


def _unit_rows(units: list[Unit], max_row_bytes: int) -> Iterator[Row]:
    for unit in units:
        for part in unit.parts:
            yield from read_rows(part, max_row_bytes)


def _check_tokenizer(settings: EncoderSettings, kinds: set[str]) -> None:
    encoder = settings.load()
    if "chat" in kinds and not encoder.has_chat_template:
        raise ModelError(
            f"the sources hold chat messages and {settings.model_name_or_path} has no chat"
            " template; set model.chat_template to a Jinja file"
        )
    if "text" in kinds and not encoder.has_eos:
        raise ModelError(
            f"the sources hold string pairs and the tokenizer of {settings.model_name_or_path} has"
            " no EOS token to end them; name one in its tokenizer_config.json"
        )


def _fingerprint(
    config: Config,
    located: list[LocatedSource],
    sources: list[SourceSettings],
    settings: EncoderSettings,
) -> dict[str, Any]:
    corpus = config.corpus
    return {
        "sources": [
            {
                "name": used.name,
                "shape": used.shape,
                "columns": dict(used.columns or {}),
                "weight": used.weight,
                "holdout": used.holdout,
                "max_rows": source.max_rows,
                "split": found.dataset.split if found.dataset else None,
                "dataset": source.dataset,
                "contents": contents(found),
            }
            for source, found, used in zip(corpus.sources, located, sources, strict=True)
        ],
        "corpus": corpus.model_dump(exclude={"sources", "max_bad_fraction"}),
        "encoding": config.encoding.model_dump(),
        "tokenizer": tokenizer_fingerprint(settings),
        "code": CODE_VERSION,
    }
