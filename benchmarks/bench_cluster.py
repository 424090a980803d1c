"""How far does it scale? What Ray adds to a shard, and what more replicas bring.

    refscale bench cluster                                   # sleeping scorers, this machine
    refscale bench cluster --nodes 1,2,4                     # simulated nodes on this machine
    refscale bench cluster --address ADDRESS --run-dir RUN --replicas 1,2,4,8

Sleeping scorers take a known time and no CPU, so what is missing to full use is Ray's: scheduling,
moving shards, starting the next one. With --run-dir, real replicas score the prepared corpus of a
run again, without publishing, and every GPU type gets its share of the peak. Efficiency is taken
over the time in which all replicas are up: starting them is a column of its own.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import yaml
from common import BenchmarkError, Row, load_result, markdown_table, spread, write_result

UNITS = {
    "overhead_ms": "a shard",
    "efficiency": "of full use",
    "throughput": "shards/s",
    "driver_ms": "CPU of the driver, a shard",
    "tokens_per_s": "tokens/s a replica",
    "mfu": "of the peak",
}


class SleepingScorer:
    """Takes `seconds` a shard and says when and where."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """One shard."""
        started = time.time()
        time.sleep(self._seconds)
        place = f"{socket.gethostname()}:{os.getpid()}"
        return {"shard": item["shard"], "started": started, "ended": time.time(), "replica": place}


class TimedScorer:
    """A scoring replica that also says when it worked and on what."""

    def __init__(self, settings: Any) -> None:
        from refscale.scoring.shard_scoring import ShardScorer

        self._scorer = ShardScorer(settings)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """One shard's counts."""
        import json

        started = time.time()
        counts = json.loads(self._scorer(item)["counts"])
        return {
            "shard": item["shard"],
            "started": started,
            "ended": time.time(),
            "replica": counts["replica"],
            "tokens": counts["stats"]["useful_tokens"],
            "flops": counts["stats"]["flops"],
            "device": counts["engine"]["device"],
        }


def _pass_on(item: dict[str, Any]) -> dict[str, Any]:
    """Stands for reading and for publishing."""
    return item


def measure(
    items: list[dict[str, Any]], steps: list[Any], replicas: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Run the graph once; figures of the time in which all replicas were up, and the results.

    Raises:
        BenchmarkError: Fewer replicas came up than were asked for, or too few shards were there.
    """
    from refscale.cluster.runtime import run_graph

    begun, cpu = time.time(), time.process_time()
    results = list(run_graph(items, steps))
    wall, cpu = time.time() - begun, time.process_time() - cpu
    by_replica: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_replica.setdefault(result["replica"], []).append(result)
    if len(by_replica) < replicas:
        raise BenchmarkError(
            f"{len(by_replica)} of {replicas} replicas got a shard; give more shards, or a cluster"
            " with room for all"
        )
    first = max(min(r["started"] for r in found) for found in by_replica.values())
    last = min(max(r["ended"] for r in found) for found in by_replica.values())
    if last <= first:
        raise BenchmarkError("the replicas were never all up at the same time; give more shards")
    busy = sum(max(0.0, min(r["ended"], last) - max(r["started"], first)) for r in results)
    inside = sum(first <= r["ended"] <= last for r in results)
    available = replicas * (last - first)
    figures = {
        "wall_s": wall,
        "start_s": first - begun,
        "efficiency": busy / available,
        "overhead_ms": 1000 * (available - busy) / max(inside, 1),
        "throughput": inside / (last - first),
        "driver_ms": 1000 * cpu / len(results),
    }
    return figures, results


def sleeping(
    replicas: int, *, shard_s: float, shards_each: int, repeats: int
) -> dict[str, list[float]]:
    """Figures of sleeping scorers, `repeats` times."""
    import ray

    from refscale.cluster.runtime import Step

    cpus = ray.cluster_resources().get("CPU", 0)
    if cpus < replicas + 1:
        print(f"{replicas} replicas wait until there are more than {cpus:g} CPUs", file=sys.stderr)
    items = [{"shard": f"shard-{i:05d}"} for i in range(replicas * shards_each)]
    scorer = Step(SleepingScorer, options={"seconds": shard_s}, pool=(replicas, replicas))
    # A CPU for each, as in a run. Ray keeps as many processes as there are CPUs: with more in
    # flight it ends and starts them all the time, and that is what would be measured.
    steps = [Step(_pass_on), scorer, Step(_pass_on)]
    return _repeat(lambda: measure(items, steps, replicas)[0], repeats)


def scoring(run_dir: str, replicas: int, *, repeats: int) -> tuple[dict[str, list[float]], str]:
    """Figures of real replicas on a run's prepared corpus, and the device that they ran on."""
    import ray
    from trl.trainer.utils import get_peak_flops

    from refscale.cluster.runtime import Step
    from refscale.config import parse_config
    from refscale.scoring import shard_scoring as engine
    from refscale.storage.stages import StageFolder
    from refscale.storage.store import Store

    store = Store(run_dir)
    config = parse_config(yaml.safe_load(store.read_bytes("config.yaml")))
    corpus = StageFolder(store, "corpus")
    names = [file["name"].removesuffix(".parquet") for file in corpus.require()["files"]]
    gpus = config.ray.gpus_per_replica
    gpus = float(ray.cluster_resources().get("GPU", 0) > 0) if gpus is None else gpus
    model, cpus = config.model, config.ray.cpus_per_replica
    dtype, reason = engine.resolve_dtype(model.dtype, cuda=gpus > 0)
    settings = engine.ScorerSettings(
        model_name_or_path=model.model_name_or_path,
        revision=model.revision,
        dtype=dtype,
        dtype_reason=reason,
        path=config.score.path,
        token_budget=config.score.token_budget,
        compilation=config.score.compile,
        trust_remote_code=model.trust_remote_code,
        attn_implementation=model.attn_implementation,
        adapter=model.adapter,
        quantization=config.score.quantization,
        num_threads=max(1, int(cpus)),
    )
    steps = [
        Step(engine.read_pairs(corpus), num_cpus=config.ray.cpus_per_task),
        Step(
            TimedScorer,
            options={"settings": settings},
            pool=(replicas, replicas),
            num_cpus=cpus,
            num_gpus=gpus,
        ),
    ]
    items = [{"shard": name} for name in names]
    device = ""

    def once() -> dict[str, float]:
        nonlocal device
        figures, results = measure(items, steps, replicas)
        seconds = sum(r["ended"] - r["started"] for r in results)
        figures["tokens_per_s"] = sum(r["tokens"] for r in results) / seconds
        device = ", ".join(sorted({r["device"] for r in results}))
        peak = get_peak_flops(device, settings.dtype)
        if peak:
            rate = sum(r["flops"] for r in results) / seconds
            figures["mfu"] = rate / (peak * max(gpus, 1))
        return figures

    return _repeat(once, repeats), device


def _repeat(once: Any, repeats: int) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, value in once().items():
            figures.setdefault(name, []).append(value)
    return figures


def _row(label: dict[str, Any], figures: dict[str, list[float]]) -> Row:
    return {**label, **{name: spread(values) for name, values in figures.items()}}


def _connect(address: str | None, cpus: int) -> None:
    """Connect, and let workers take this script's classes by value: they cannot import it."""
    from ray import cloudpickle

    from refscale.cluster.runtime import connect

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    connect(address, num_cpus=cpus, replicas=1, cpus_per_replica=1)


def simulated_nodes(nodes: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Sleeping scorers on a cluster of `nodes` Ray nodes of this machine."""
    import ray
    from ray.cluster_utils import Cluster

    each = arguments.replicas_per_node
    cluster = Cluster(initialize_head=False)
    try:
        cluster.add_node(num_cpus=2)
        for _ in range(nodes):
            cluster.add_node(num_cpus=each)
        _connect(cluster.address, each)
        return sleeping(
            nodes * each,
            shard_s=arguments.shard_s,
            shards_each=arguments.shards_each,
            repeats=arguments.repeats,
        )
    finally:
        ray.shutdown()
        cluster.shutdown()


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part]
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"needs positive numbers such as 1,2,4, got {text!r}")
    return numbers


def plot(rows: Sequence[Row], title: str) -> str:
    """Efficiency against replicas, as an SVG file's text."""
    width, height, left, bottom = 560, 320, 60, 50
    counts = [row["replicas"] for row in rows]
    # Equally spaced: replicas are usually doubled.
    step = (width - 2 * left) / max(len(rows) - 1, 1)
    points = [
        (left + i * step, height - bottom - row["efficiency"]["median"] * (height - 2 * bottom))
        for i, row in enumerate(rows)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/><text x="{x:.1f}" y="{height - bottom + 20}">'
        f'{count}</text><text x="{x:.1f}" y="{y - 10:.1f}">{row["efficiency"]["median"]:.1%}</text>'
        for (x, y), count, row in zip(points, counts, rows, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12" text-anchor="middle">'
        f'<text x="{width / 2}" y="20">{title}</text><text x="{width / 2}" y="{height - 10}">'
        f'replicas</text><path d="M{left},{bottom} V{height - bottom} H{width - left}" fill="none"'
        f' stroke="#888"/><polyline points="{path}" fill="none" stroke="#1f6feb"'
        f' stroke-width="2"/>{marks}</svg>\n'
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, write the result and its plot, and print the table."""
    parser = argparse.ArgumentParser(prog="refscale bench cluster", description=__doc__)
    parser.add_argument("--replicas", type=_numbers, default=[1, 2, 4, 64])
    parser.add_argument("--nodes", type=_numbers, help="simulated nodes instead of --replicas")
    parser.add_argument("--replicas-per-node", type=int, default=2)
    parser.add_argument("--shard-s", type=float, default=2.0, help="a sleeping scorer's seconds")
    parser.add_argument("--shards-each", type=int, default=10, help="shards for each replica")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--address", help="of a running Ray; default: an embedded one")
    parser.add_argument("--run-dir", help="a run with a prepared corpus, to score for real")
    parser.add_argument("--out", help="JSON file or folder; default: benchmarks/results")
    arguments = parser.parse_args(argv)
    from refscale.cluster.runtime import disconnect

    rows: list[Row] = []
    for count in arguments.nodes or arguments.replicas:
        label: dict[str, Any] = {"replicas": count}
        if arguments.nodes:
            label = {"nodes": count, "replicas": count * arguments.replicas_per_node}
            label["shard_s"] = arguments.shard_s
            figures = simulated_nodes(count, arguments)
        else:
            _connect(arguments.address, count + 8)
            if arguments.run_dir:
                figures, label["device"] = scoring(
                    arguments.run_dir, count, repeats=arguments.repeats
                )
            else:
                label["shard_s"] = arguments.shard_s
                figures = sleeping(
                    count,
                    shard_s=arguments.shard_s,
                    shards_each=arguments.shards_each,
                    repeats=arguments.repeats,
                )
            disconnect(force=True)
        rows.append(_row(label, figures))
    for row in rows:
        gain = row["throughput"]["median"] / rows[0]["throughput"]["median"]
        row["speedup"] = gain
        row["scaling"] = gain * rows[0]["replicas"] / row["replicas"]
    kind = "nodes" if arguments.nodes else "scoring" if arguments.run_dir else "overhead"
    notes = [
        "efficiency: busy share of the scorers while all are up; throughput counts the shards that"
        " end in that time, so few shards make it coarse",
        "scaling: throughput a replica against the first row's",
        "driver: with its start; it is one process, so its CPU time a shard bounds how many shards"
        " a second any number of replicas can do",
    ]
    if not arguments.run_dir:
        notes.append("scorers sleep: the figures are Ray's part alone, not a model's")
    path = write_result(
        f"cluster_{kind}",
        config=vars(arguments),
        rows=rows,
        units=UNITS,
        notes=notes,
        not_measured=[] if arguments.address else ["more than one machine: all was on this one"],
        out=arguments.out,
    )
    path.with_suffix(".svg").write_text(plot(rows, f"Efficiency, {kind}"), encoding="utf-8")
    print(markdown_table(load_result(path)))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
