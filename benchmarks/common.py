"""What every benchmark shares: timing, spread, provenance, JSON results, Markdown tables.

In: rows of figures. Out: one JSON file per run, with the commit, the machine and the versions that
made it, and a Markdown table generated from that file alone. A result whose commit is unknown is
refused, since nobody could repeat it; a working tree with changes is marked as dirty.

    timings = interleaved({"ours": run_ours, "theirs": run_theirs}, repeats=5)
    rows = [{"scorer": name, "seconds": spread(seconds)} for name, seconds in timings.items()]
    path = write_result("scoring", config=vars(args), rows=rows, units={"seconds": "s"})
    print(markdown_table(load_result(path)))
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from refscale.errors import RefscaleError
from refscale.storage.fingerprints import library_versions

RESULTS = Path(__file__).resolve().parent / "results"
_ROOT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]


class BenchmarkError(RefscaleError):
    """A benchmark cannot run as asked, or its result could not be repeated."""


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, 20th and 80th percentile and number of `values`, as a row of a result holds them."""
    if not len(values):
        raise BenchmarkError("no values were measured, so there is no median; repeat at least once")
    low, median, high = np.percentile(np.asarray(values, dtype=np.float64), [20, 50, 80])
    return {
        "median": float(median),
        "p20": float(low),
        "p80": float(high),
        "repeats": len(values),
    }


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    on_run: Callable[[str, float], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each candidate, one of each in turn: what else the machine does hits all alike.

    Args:
        candidates: What to time, by name. On a GPU each must wait for its device to finish.
        repeats: Timed runs of each.
        warmups: Runs of each before that are not counted.
        clock: Seconds.
        on_run: Told of each counted run: its name and seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmups + repeats):
        for name, candidate in candidates.items():
            started = clock()
            candidate()
            took = clock() - started
            if turn >= warmups:
                seconds[name].append(took)
                if on_run is not None:
                    on_run(name, took)
    return seconds


# -- where and on what -----------------------------------------------------------------------------


def commit(root: Path = _ROOT) -> tuple[str, bool]:
    """The commit that is measured and whether files differ from it.

    Outside a checkout, such as in an image, REFSCALE_COMMIT names it: 40 hex digits, with `-dirty`
    where the tree was changed.

    Raises:
        BenchmarkError: It is unknown.
    """
    named = os.environ.get("REFSCALE_COMMIT", "")
    if named:
        if not re.fullmatch(r"[0-9a-f]{40}(-dirty)?", named):
            raise BenchmarkError(
                f"REFSCALE_COMMIT must be 40 hex digits, with -dirty for a changed tree;"
                f" got {named!r}"
            )
        return named[:40], named.endswith("-dirty")
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        raise BenchmarkError(
            f"{root} is not a git checkout, so the commit is unknown and the result is not written;"
            " run in a checkout or set REFSCALE_COMMIT"
        )
    # Results written before do not change what is measured.
    status = _git(root, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return head, bool(status)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """CPU, memory and GPUs of this machine."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [],
    }
    flags = _cpu_field("flags").split()
    found["cpu_bf16"] = sorted({"avx512_bf16", "amx_bf16"} & set(flags))
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
        found["driver"] = _nvidia("driver_version")
        found["power_limit"] = _nvidia("power.limit")
    return found


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _cpu_name() -> str:
    name = _cpu_field("model name") or platform.processor() or platform.machine()
    family, model = _cpu_field("cpu family"), _cpu_field("model\t")
    return f"{name} (family {family}, model {model})" if family else name


def _nvidia(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def versions(*more: str) -> dict[str, str]:
    """Versions of python and the libraries that the figures depend on; `more` if installed."""
    found = {"python": platform.python_version(), **library_versions()}
    for name in more:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def short_hardware() -> str:
    """A file name's worth of the hardware, for example `1x-nvidia-h100` or `epyc-2-cores`."""
    found = hardware()
    if found["gpus"]:
        text = f"{len(found['gpus'])}x-{found['gpus'][0]}"
    else:
        text = f"{found['cpu'].partition('(')[0]}-{found['cores']}-cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# -- results ---------------------------------------------------------------------------------------


def write_result(
    question: str,
    *,
    config: Mapping[str, Any],
    rows: Sequence[Row],
    units: Mapping[str, str] | None = None,
    titles: Mapping[str, str] | None = None,
    columns: Sequence[str] | None = None,
    data: Mapping[str, Any] | None = None,
    not_measured: Sequence[str] = (),
    notes: Sequence[str] = (),
    out: str | Path | None = None,
) -> Path:
    """Write a run's result; the file's path.

    Args:
        question: Of the benchmark, for example `scoring`.
        config: Every argument that the run had, resolved.
        rows: One dict a row. A figure is a number or `spread`; a run that failed is a row too, with
            the reason in the column `failed`.
        units: Unit of each column that has one.
        titles: Of columns in the Markdown table; a column's own is its name and unit.
        columns: Of the Markdown table, in order; None is all columns of the rows.
        data: What was measured on: names, fingerprints, length statistics.
        not_measured: What a reader would look for and will not find, with the reason.
        notes: What has to be known to read the figures.
        out: A .json file, or a folder; None is benchmarks/results.

    Raises:
        BenchmarkError: The commit is unknown.
    """
    head, dirty = commit()
    now = datetime.now(UTC)
    result = {
        "question": question,
        "commit": head,
        "dirty": dirty,
        "time": now.isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions("ctranslate2", "lm_eval"),
        "config": dict(config),
        "data": dict(data or {}),
        "units": dict(units or {}),
        "titles": dict(titles or {}),
        "columns": list(columns) if columns else _all_columns(rows),
        "rows": list(rows),
        "not_measured": list(not_measured),
        "notes": list(notes),
    }
    path = Path(out) if out is not None else RESULTS
    if path.suffix != ".json":
        path = path / f"{question}_{short_hardware()}_{now:%Y%m}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(result), indent=1, default=_plain, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def load_result(path: str | Path) -> dict[str, Any]:
    """A result written by `write_result`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _all_columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: None stands for them."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def markdown_table(result: Mapping[str, Any]) -> str:
    """The result's table, where it was measured, and what was not; Markdown.

    A figure with spread is shown as `median (p20-p80)`.
    """
    columns: list[str] = result["columns"]
    units = result["units"]
    given = result.get("titles", {})
    titles = [
        given.get(name) or name.replace("_", " ") + (f" ({units[name]})" if units.get(name) else "")
        for name in columns
    ]
    numeric = {
        name: any(isinstance(row.get(name), int | float | dict) for row in result["rows"])
        for name in columns
    }
    lines = [
        "| " + " | ".join(titles) + " |",
        "|" + "|".join("---:" if numeric[name] else "---" for name in columns) + "|",
    ]
    lines += [
        "| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in result["rows"]
    ]
    machine = result["hardware"]
    gpus = machine["gpus"]
    where = f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine['cpu']}, {machine['cores']} cores"
    state = " with uncommitted changes" if result["dirty"] else ""
    libraries = ", ".join(
        f"{name} {result['versions'][name]}"
        for name in ("torch", "transformers", "trl", "ray", "deepspeed")
        if name in result["versions"]
    )
    lines += [
        "",
        f"Measured {result['time'][:10]} on {where}; commit {result['commit'][:12]}{state};"
        f" {libraries}. Median (20th to 80th percentile).",
    ]
    lines += [f"- {note}" for note in result["notes"]]
    lines += [f"- Not measured: {what}" for what in result["not_measured"]]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping) and "median" in value:
        if value["repeats"] == 1:
            return _number(value["median"])
        return f"{_number(value['median'])} ({_number(value['p20'])}–{_number(value['p80'])})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    if value is None:
        return "–"
    if isinstance(value, int) or value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
