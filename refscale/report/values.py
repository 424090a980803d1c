"""The numbers of a run's report, out of its manifests, training log and quarantine.

In: a run folder, finished or not. Out: one dict of strict JSON values with a fixed set of sections;
a section whose stage has not been run, or is not of the stages before it as they are now, is None.
report.html shows exactly these values. Costs a few small reads: no table but the first refused
rows, so it takes seconds for any corpus.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refscale.config import Config
from refscale.lineage import fingerprint_before, stale_stages
from refscale.progress import say
from refscale.report.verdict import Values, verdict
from refscale.selection.statistics import LARGE_LEAN, length_lean
from refscale.sizing.footprint import GPUS
from refscale.storage.stages import STAGE_COMMANDS, StageFolder
from refscale.storage.store import Store
from refscale.training.log import LOG_FILE, read_log

FORMAT_VERSION = 1
CURVES = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "grad_norm",
    "learning_rate",
    "eval_loss",
    "eval_rewards/margins",
    "eval_rewards/accuracies",
)
# Dense FLOP/s in 16 bits by the model in a device's name; of Hopper the SXM cards', the others are
# slower.
_PEAKS = {name.partition("-")[0]: gpu.bf16_tflops * 1e12 for name, gpu in GPUS.items()}
_SLOWER = ("PCIe", "NVL")
# A quarter of the key's variance is then that of length: r^2 = 0.25.
_LARGE_CORRELATION = 0.5
_CURVE_POINTS = 400
_REFUSED_EXAMPLES = 3
_REFUSED_FILES_READ = 64
_RAW_CHARACTERS = 400
_TEXT_CHARACTERS = 1500
_SECRET = re.compile(r"(?:^|[_-])(?:token|secret|password|api_?key|access_?key)$", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")


@dataclass(frozen=True)
class ReportData:
    """What a run folder holds so far.

    Attributes:
        uri: Of the run folder.
        config: Of the run.
        manifests: By stage folder; a stage that is stale or not finished is absent.
        stale: By stage folder, why what it holds is not shown beside the others.
        log: Rows of the training log.
        refused: A few refused rows by reason.
        cuts: By selection group, the keys at which the kept part begins or ends.
    """

    uri: str
    config: Config
    manifests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stale: Mapping[str, str] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()
    refused: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    cuts: Mapping[str, Sequence[float]] = field(default_factory=dict)


# -- collecting ------------------------------------------------------------------------------------


def collect(store: Store, config: Config) -> ReportData:
    """Read what a report needs from a run folder, finished or not.

    Raises:
        StorageError: A manifest or a quarantine table is damaged.
    """
    folders = {stage: StageFolder(store, stage) for stage in ("quarantine", *STAGE_COMMANDS)}
    found = {stage: folder.manifest() for stage, folder in folders.items()}
    finished = {stage: manifest for stage, manifest in found.items() if manifest is not None}
    unfinished = [stage for stage in folders if stage not in finished]
    begun = {stage: fingerprint_before(folders[stage]) for stage in unfinished}
    stale = stale_stages(finished, {stage: made for stage, made in begun.items() if made})
    manifests = {stage: manifest for stage, manifest in finished.items() if stage not in stale}
    return ReportData(
        uri=store.uri,
        config=config,
        manifests=manifests,
        stale=stale,
        log=[] if "training" in stale else _log(folders["training"], found["training"]),
        refused=_refused_examples(folders["quarantine"], manifests.get("quarantine", {})),
        cuts=_cuts(folders["selection"], manifests.get("selection", {})),
    )


def _log(folder: StageFolder, manifest: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Rows of the training log; none of a damaged one, which no command would ever write again."""
    try:
        rows = read_log(folder)
        damaged = manifest is not None and bool(folder.damaged(manifest))
    except ValueError:
        damaged = True
    if not damaged:
        return rows
    say(f"report    {folder.file(LOG_FILE)} is damaged or missing; its curves are left out")
    return []


def _refused_examples(
    folder: StageFolder, manifest: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """The first refused rows of each reason, of at most a few tables."""
    reasons = manifest.get("counts", {})
    files = [record["name"] for record in manifest.get("files", []) if record["rows"]]
    examples: dict[str, list[dict[str, Any]]] = {}
    for name in files[:_REFUSED_FILES_READ]:
        if all(
            len(examples.get(reason, ())) >= min(count, _REFUSED_EXAMPLES)
            for reason, count in reasons.items()
        ):
            break
        for row in folder.read_table(name).to_pylist():
            shown = examples.setdefault(row["reason"], [])
            if len(shown) < _REFUSED_EXAMPLES:
                file = _without_credentials(row["file"])
                shown.append({**row, "file": file, "raw": _cut(row["raw"], _RAW_CHARACTERS)})
    return examples


def _cuts(folder: StageFolder, manifest: Mapping[str, Any]) -> dict[str, list[float]]:
    details = manifest.get("details", {})
    if details.get("match_lengths"):
        return {}  # a cut for each class of length differences: no line of one key's histogram
    groups = details.get("groups", {})
    cuts = {
        name: [group["threshold"]]
        for name, group in groups.items()
        if group.get("threshold") is not None
    }
    if groups and folder.store.exists(folder.file("selection.json")):
        # Where the kept part has two ends, the threshold is the second; the decision has both.
        decision = folder.store.read_json(folder.file("selection.json")).get("decision", {})
        for name, interval in decision.get("groups", {}).items():
            if interval.get("lower"):
                cuts[name] = [interval["lower"]["value"], *cuts.get(name, [])]
    return cuts


# -- values ----------------------------------------------------------------------------------------


def report_json(data: ReportData) -> Values:
    """The report's values: strict JSON, the same for the same run folder."""
    values = {
        "format_version": FORMAT_VERSION,
        "run": _without_credentials(data.uri),
        "finished": max((m.get("finished", "") for m in data.manifests.values()), default=None),
        "verdict": [],
        "funnel": _funnel(data),
        "selection": _selection(data),
        "scoring": _scoring(data),
        "training": _training(data),
        "evaluation": _evaluation(data),
        "config": _without_credentials(data.config.model_dump(mode="json")),
        "stages": _stages(data),
        "fingerprints": {
            stage: _without_credentials(manifest.get("fingerprint", {}))
            for stage, manifest in data.manifests.items()
        },
        "versions": _versions(data.manifests.values()),
    }
    values["verdict"] = verdict(values)
    return _plain(values)


def _details(data: ReportData, stage: str) -> Mapping[str, Any] | None:
    manifest = data.manifests.get(stage)
    return None if manifest is None else manifest.get("details", {})


def _funnel(data: ReportData) -> Values | None:
    corpus, scores = data.manifests.get("corpus"), data.manifests.get("scores")
    quarantined = dict(data.manifests.get("quarantine", {}).get("counts", {}))
    if corpus is None and not quarantined:
        return None
    counts = dict((corpus or {}).get("counts", {}))
    read, refused = counts.get("read"), sum(quarantined.values())
    selection = _details(data, "selection") or {}
    steps: list[tuple[str, Any, str]] = [
        ("read", read, "rows of the sources"),
        ("valid", None if read is None else read - refused, "not quarantined"),
        ("corpus", corpus and corpus.get("rows"), "encoded pairs without duplicates"),
        ("scored", scores and scores.get("rows"), "with log-probs of the reference model"),
        ("selectable", selection.get("num_pairs"), "not held out"),
        ("kept", selection.get("num_kept"), "trained on"),
    ]
    return {
        "steps": [
            {"name": name, "count": count, "share": _share(count, read), "what": what}
            for name, count, what in steps
            if count is not None
        ],
        "counts": {
            name: value
            for name, value in counts.items()
            if isinstance(value, int) and name not in ("read", "kept")
        },
        "quarantined": dict(sorted(quarantined.items(), key=lambda item: (-item[1], item[0]))),
        "num_quarantined": refused,
        "quarantined_share": _share(refused, read),
        "examples": {reason: list(rows) for reason, rows in data.refused.items()},
        "unscorable": dict((scores or {}).get("counts", {}).get("unscorable", {})),
        "sources": _without_credentials((corpus or {}).get("details", {}).get("sources", [])),
    }


def _selection(data: ReportData) -> Values | None:
    details = _details(data, "selection")
    if details is None:
        return None
    total, kept = details.get("num_pairs"), details.get("num_kept")
    correlation = (details.get("all") or {}).get("key_length_correlation")
    lean = length_lean(details.get("all") or {}, details.get("kept") or {})
    sources = {
        name: {**counts, "share": _share(counts.get("kept"), counts.get("pairs"))}
        for name, counts in details.get("sources", {}).items()
    }
    examples = {
        place: [
            {**e, **{name: _cut(e.get(name) or "", _TEXT_CHARACTERS) for name in _SIDES}}
            for e in details.get("examples", {}).get(place, [])
        ]
        for place in ("top", "cut", "bottom")
    }
    return {
        **{
            name: details.get(name)
            for name in ("strategy", "keep", "size", "per_source", "match_lengths", "histogram")
        },
        "num_pairs": total,
        "num_kept": kept,
        "share": _share(kept, total),
        "all": details.get("all") or {},
        "kept": details.get("kept") or {},
        "sources": sources,
        "groups": details.get("groups", {}),
        "cuts": {name: list(ends) for name, ends in data.cuts.items()},
        "scatter": details.get("scatter") or None,
        "length_lean": lean,
        "leans": lean is not None and abs(lean) > LARGE_LEAN,
        "follows_length": not details.get("match_lengths")
        and correlation is not None
        and abs(correlation) >= _LARGE_CORRELATION,
        "examples": examples,
    }


_SIDES = ("prompt", "chosen", "rejected")


def _scoring(data: ReportData) -> Values | None:
    details = _details(data, "scores")
    if details is None:
        return None
    engine = details.get("engine", {})
    peak = _peak_flops(engine, data.config.ray.gpus_per_replica)
    replicas = {
        name: {**r, "wait_share": _share(r.get("wait_s"), r.get("wait_s", 0) + r.get("seconds", 0))}
        for name, r in details.get("replicas", {}).items()
    }
    waited = sum(r.get("wait_s", 0) for r in replicas.values())
    busy = sum(r.get("seconds", 0) for r in replicas.values())
    return {
        **details,
        "engine": engine,
        "replicas": replicas,
        "wait_share": details.get("wait_share", _share(waited, waited + busy)),
        "peak_flops_per_s": peak,
        "mfu": _share(details.get("model_flops_per_s"), peak),
    }


def _peak_flops(engine: Mapping[str, Any], gpus_per_replica: float | None) -> float | None:
    """Peak of one replica; None where the device's is not known or a GPU is shared."""
    gpus = 1.0 if gpus_per_replica is None else gpus_per_replica
    if engine.get("dtype") not in ("bfloat16", "float16") or gpus < 1:
        return None
    device = str(engine.get("device", ""))
    if any(name in device for name in _SLOWER) and "A100" not in device:
        return None
    # An L40 is no L4.
    return next(
        (peak * gpus for name, peak in _PEAKS.items() if re.search(rf"{name}\b", device)), None
    )


def _training(data: ReportData) -> Values | None:
    metrics = _details(data, "training")
    if metrics is None:  # deleted, as its checkpoints are large: the policy has the same details
        metrics = _details(data, "policy")
    if metrics is None and not data.log:
        return None
    return {
        "finished": metrics is not None,
        "metrics": dict(metrics or {}),
        "curves": {name: _curve(data.log, name) for name in CURVES},
        "num_logged": len(data.log),
        "last_step": data.log[-1].get("step") if data.log else (metrics or {}).get("steps"),
        "max_steps": data.log[-1].get("max_steps") if data.log else None,
    }


def _curve(log: Sequence[Mapping[str, Any]], name: str) -> Values:
    """Steps and values; a long log as the means of equally many consecutive rows."""
    points = [
        (row.get("step", i + 1), row[name])
        for i, row in enumerate(log)
        if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])
    ]
    width = math.ceil(len(points) / _CURVE_POINTS) or 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return {
        "rows_a_point": width,
        "steps": [group[-1][0] for group in groups],
        "values": [sum(value for _, value in group) / len(group) for group in groups],
    }


def _evaluation(data: ReportData) -> Values | None:
    details = _details(data, "evaluation")
    if details is None:
        return None
    names = ("beta", "overall", "sources", "purity", "unscorable")
    return {name: details.get(name) for name in names}


def _stages(data: ReportData) -> list[Values]:
    stages = []
    for stage, command in STAGE_COMMANDS.items():
        if stage == "training":  # written together with policy/
            continue
        manifest = data.manifests.get(stage, {})
        stages.append(
            {
                "stage": stage,
                "command": command,
                "done": bool(manifest),
                "stale": data.stale.get(stage),
                "rows": manifest.get("rows") if stage != "policy" else None,
                "seconds": manifest.get("seconds"),
                "finished": manifest.get("finished"),
                "identity": manifest.get("identity"),
            }
        )
    return stages


def _versions(manifests: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Versions by library; more than one where stages were run with different ones."""
    versions: dict[str, list[str]] = {}
    for manifest in manifests:
        for name, version in manifest.get("versions", {}).items():
            seen = versions.setdefault(name, [])
            if version not in seen:
                seen.append(version)
    return versions


# -- plain values ----------------------------------------------------------------------------------


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _plain(value: Any) -> Any:
    """`value` as strict JSON in valid Unicode."""
    if isinstance(value, Mapping):
        return {_plain(str(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _without_credentials(value: Any, name: str = "") -> Any:
    """`value` without what keys and URIs may carry of them: a report is passed around."""
    if isinstance(value, Mapping):
        return {key: _without_credentials(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_credentials(item, name) for item in value]
    if isinstance(value, str):
        return "(not shown)" if value and _SECRET.search(name) else _USER_INFO.sub("", value)
    return value
