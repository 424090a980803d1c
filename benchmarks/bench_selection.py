"""How long does the exact selection take, and what memory, from a million keys to a hundred?

In: sizes, shares of ties. Out: a row for each: seconds and passes of the radix selection, memory,
the same for numpy, and whether both keep the same pairs. Keys are made a chunk at a time from a
counter, so neither side is charged for objects, files or a corpus: what is timed is the selection.

Memory is resident memory at its peak less that before, each side in a process of its own. numpy
holds all keys at once (20 bytes each) and partitions by value, then sorts the ties by pair_id.
"""

import argparse
import hashlib
import multiprocessing
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from common import BenchmarkError, load_result, markdown_table, write_result

from refscale.selection.order import Keys, SelectionSpec, rank_bits
from refscale.selection.radix import RadixSelect, Tally

_CHUNK = 1 << 18  # pairs; a task of the cluster's passes holds about as many
_TIES = 0.9


def chunks(total: int, ties: float, seed: int) -> Iterator[Keys]:
    """`total` keys: standard normal values, of which a share `ties` is one value."""
    for index, start in enumerate(range(0, total, _CHUNK)):
        size = min(_CHUNK, total - start)
        rng = np.random.default_rng([seed, index])
        values = rng.standard_normal(size, dtype=np.float32)
        values[rng.random(size, dtype=np.float32) < ties] = 0.5
        pair_ids = rng.integers(0, 1 << 64, size=(size, 2), dtype=np.uint64)
        source = np.broadcast_to(np.array("a", dtype=object), size)
        difference = np.broadcast_to(np.array(0), size)
        yield Keys(values, pair_ids, source, difference)


def peak_bytes(pid: int | str = "self") -> int:
    """Largest resident memory that a process has had; bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _digest(kept: Iterator[np.ndarray]) -> str:
    hasher = hashlib.sha256()
    for mask in kept:
        hasher.update(np.packbits(mask).tobytes())
    return hasher.hexdigest()


def radix(total: int, ties: float, fraction: float, seed: int) -> dict[str, Any]:
    """Our selection; `seconds` leaves out the making of the keys."""
    search = RadixSelect(SelectionSpec(fraction=fraction))
    passes, seconds = 0, 0.0
    while not search.done:
        tally = Tally()
        for keys in chunks(total, ties, seed):
            started = time.perf_counter()
            tally += search.tally(keys)
            seconds += time.perf_counter() - started
        search.advance(tally)
        passes += 1
    decision = search.decision()
    marking = 0.0

    def masks() -> Iterator[np.ndarray]:
        nonlocal marking
        for keys in chunks(total, ties, seed):
            started = time.perf_counter()
            mask = decision.mask(keys)
            marking += time.perf_counter() - started
            yield mask

    digest = _digest(masks())
    return {
        "seconds": seconds + marking,
        "passes": passes + 1,
        "kept": decision.kept,
        "digest": digest,
    }


def in_memory(total: int, ties: float, fraction: float, seed: int) -> dict[str, Any]:
    """numpy: all keys at once, np.partition for the value at the cut, np.lexsort of its ties."""
    bits = np.empty(total, np.uint32)
    pair_ids = np.empty((total, 2), np.uint64)
    start = 0
    for keys in chunks(total, ties, seed):
        bits[start : start + len(keys)] = rank_bits(keys.values, descending=True)
        pair_ids[start : start + len(keys)] = keys.pair_ids
        start += len(keys)
    started = time.perf_counter()
    size = min(total, max(1, int(np.floor(fraction * total + 0.5))))
    cut = np.partition(bits, size - 1)[size - 1]
    kept = bits < cut
    same = np.flatnonzero(bits == cut)
    order = np.lexsort((pair_ids[same, 1], pair_ids[same, 0]))
    kept[same[order[: size - int(kept.sum())]]] = True
    seconds = time.perf_counter() - started
    parts = (kept[start : start + _CHUNK] for start in range(0, total, _CHUNK))
    return {"seconds": seconds, "passes": 1, "kept": int(kept.sum()), "digest": _digest(parts)}


_SIDES = {"radix": radix, "numpy": in_memory}


def _measure(pipe: Connection, side: str, arguments: tuple[int, float, float, int]) -> None:
    before = peak_bytes()
    found = _SIDES[side](*arguments)
    pipe.send({**found, "peak_memory_bytes": peak_bytes() - before})


def measure(side: str, *arguments: Any) -> dict[str, Any]:
    """A side's figures, from a process of its own.

    Raises:
        BenchmarkError: The process died, for example of too little memory.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(there, side, arguments))
    process.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv()
    except EOFError as exc:
        process.join()
        raise BenchmarkError(f"{side} of {arguments} died with {process.exitcode}") from exc
    process.join()
    return found


def rows_of(sizes: list[int], fraction: float, seed: int) -> Iterator[dict[str, Any]]:
    """A row for each size and share of ties.

    Raises:
        BenchmarkError: The two sides keep different pairs.
    """
    for total in sizes:
        for ties in (0.0, _TIES):
            ours, theirs = (measure(side, total, ties, fraction, seed) for side in _SIDES)
            if (ours["kept"], ours["digest"]) != (theirs["kept"], theirs["digest"]):
                raise BenchmarkError(f"of {total} keys radix and numpy keep different pairs")
            yield {
                "keys": total,
                "ties": ties,
                "kept": ours["kept"],
                "equal": True,
                "passes": ours["passes"],
                "seconds": ours["seconds"],
                "keys_per_s": total / ours["seconds"],
                "peak_memory_mib": ours["peak_memory_bytes"] / 2**20,
                "numpy_seconds": theirs["seconds"],
                "numpy_peak_memory_mib": theirs["peak_memory_bytes"] / 2**20,
            }


def main(argv: list[str]) -> int:
    """Measure, write the result, print its table."""
    parser = argparse.ArgumentParser(prog="refscale bench selection", description=__doc__)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10**6, 10**7, 10**8], help="numbers of keys"
    )
    parser.add_argument("--fraction", type=float, default=0.5, help="share that is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="file or folder of the result")
    arguments = parser.parse_args(argv)
    rows = list(rows_of(arguments.sizes, arguments.fraction, arguments.seed))
    path = write_result(
        "selection",
        config=vars(arguments),
        rows=rows,
        units={"seconds": "s", "numpy_seconds": "s", "peak_memory_mib": "MiB"},
        out=arguments.out,
    )
    print(markdown_table(load_result(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
