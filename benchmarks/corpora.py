"""Preference corpora whose right answers are known, each ambiguous in another way.

    docstrings  refscale.demo: another function's docstring is rejected; labels flipped at random
    graded      the same docstring with a share of its words exchanged is rejected; a simulated
                annotator errs the more often, the closer the two are; equal lengths in words
    facts       the value of a small list expression against a near miss; labels flipped at random
    a file      a jsonl with chosen and rejected, split by prompt, training labels flipped at random

In: sizes, a seed. Out: training rows and clean holdout rows with prompt, chosen, rejected and
label_flipped, which is true where the sides were swapped; `write` puts them into a folder with the
config of a run on them, as the benchmarks' arguments ask. Seconds.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from common import BenchmarkError, Row, load_result, markdown_table, write_result

from refscale import demo
from refscale.errors import CorpusError

Rows = list[dict[str, Any]]

# Shares of exchanged words, and how sure the annotator is: at share 1 it errs in 5 % of the pairs,
# at 1/8 in 41 %, over all shares in 24 %.
SHARES = (0.125, 0.25, 0.5, 1.0)
SURENESS = 3.0


def graded(
    num_train: int, num_holdout: int, *, seed: int = 0, flipped: float = 0.0
) -> tuple[Rows, Rows]:
    """Docstrings against the same ones with some words exchanged.

    The annotator prefers the intact one with probability 1 / (1 + exp(-SURENESS * share)), a
    Bradley-Terry choice. So wrong labels gather where the pair says little; length says nothing.

    Args:
        num_train: Training rows.
        num_holdout: Holdout rows, on other functions, with right labels.
        seed: Of everything.
        flipped: Not used: the annotator errs by itself.

    Raises:
        ValueError: There are fewer documented functions than rows asked for.
    """
    functions = demo.docstring_functions()
    if num_train + num_holdout > len(functions):
        raise ValueError(f"asked for {num_train + num_holdout} pairs, there are {len(functions)}")
    rng = random.Random(seed)
    rng.shuffle(functions)
    rows = []
    for i in range(num_train + num_holdout):
        signature, text = functions[i]
        low, high = (0, num_train) if i < num_train else (num_train, num_train + num_holdout)
        other = functions[low + (i - low + rng.randrange(1, high - low)) % (high - low)][1].split()
        words = text.split()
        share = SHARES[i % len(SHARES)]
        places = rng.sample(range(len(words)), max(1, round(share * len(words))))
        damaged = list(words)
        for place in places:
            damaged[place] = other[rng.randrange(len(other))]
        if damaged == words:
            damaged[places[0]] = "not"
        errs = rng.random() < 1 / (1 + math.exp(SURENESS * share))
        request = f"Write a one-sentence docstring for the Python function `{signature}`."
        row = _row(request, " ".join(words), " ".join(damaged), i < num_train and errs)
        rows.append({**row, "share": share})
    return rows[:num_train], rows[num_train:]


def facts(
    num_train: int, num_holdout: int, *, seed: int = 0, flipped: float = 0.3
) -> tuple[Rows, Rows]:
    """Values of small list expressions against near misses.

    Args:
        num_train: Training rows.
        num_holdout: Holdout rows, on other lists, with right labels.
        seed: Of everything.
        flipped: Share of the training labels that are swapped.
    """
    rng = random.Random(seed)
    operations: list[tuple[str, Callable[[list[int]], Any]]] = [
        ("sorted({})", sorted),
        ("{}[::-1]", lambda values: values[::-1]),
        ("sum({})", sum),
        ("max({})", max),
        ("{}[1:]", lambda values: values[1:]),
        ("[x + 1 for x in {}]", lambda values: [x + 1 for x in values]),
    ]
    rows: Rows = []
    seen: set[str] = set()
    while len(rows) < num_train + num_holdout:
        values = [rng.randrange(20) for _ in range(rng.randrange(3, 7))]
        form, operation = operations[len(rows) % len(operations)]
        expression, right = form.format(values), operation(values)
        if expression in seen:
            continue
        seen.add(expression)
        wrong = _near_miss(right, rng)
        flip = len(rows) < num_train and rng.random() < flipped
        rows.append(
            _row(f"What is the value of `{expression}` in Python?", f"{right}", f"{wrong}", flip)
        )
    return rows[:num_train], rows[num_train:]


def _near_miss(right: Any, rng: random.Random) -> Any:
    """A value that looks alike: one number off by one or two, or two neighbours exchanged."""
    if isinstance(right, int):
        return right + rng.choice((-2, -1, 1, 2))
    wrong = list(right)
    place = rng.randrange(len(wrong))
    if place and wrong[place] != wrong[place - 1] and rng.random() < 0.5:
        wrong[place - 1], wrong[place] = wrong[place], wrong[place - 1]
    else:
        wrong[place] += rng.choice((-1, 1))
    return wrong


def from_file(
    path: Path, num_train: int, num_holdout: int, *, seed: int = 0, flipped: float = 0.0
) -> tuple[Rows, Rows]:
    """A real corpus, split so that no prompt is on both sides; other columns are kept.

    Args:
        path: A jsonl whose rows have chosen and rejected, and may have prompt.
        num_train: At most so many training rows.
        num_holdout: At least so many holdout rows, as far as whole prompts allow; as they are.
        seed: Of the split and the flips.
        flipped: Share of the training labels that are swapped on purpose.

    Raises:
        CorpusError: A row lacks a side, or there are too few prompts to split.
    """
    groups: dict[str, Rows] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
            raise CorpusError(f"{path}:{number} lacks chosen or rejected")
        groups.setdefault(json.dumps(row.get("prompt") or number), []).append(row)
    rng = random.Random(seed)
    order = sorted(groups)
    rng.shuffle(order)
    train: Rows = []
    holdout: Rows = []
    for key in order:
        (holdout if len(holdout) < num_holdout else train).extend(groups[key])
    if not train:
        raise CorpusError(f"{path} has too few prompts for {num_holdout} holdout pairs")
    train = [_swapped(row, rng.random() < flipped) for row in train[:num_train]]
    return train, [_swapped(row, False) for row in holdout]


def _swapped(row: dict[str, Any], flip: bool) -> dict[str, Any]:
    chosen, rejected = row["chosen"], row["rejected"]
    if flip:
        chosen, rejected = rejected, chosen
    return {**row, "chosen": chosen, "rejected": rejected, "label_flipped": flip}


def _row(request: str, chosen: str, rejected: str, flip: bool) -> dict[str, Any]:
    row = {
        "prompt": [{"role": "user", "content": request}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    return _swapped(row, flip)


MADE: dict[str, Callable[..., tuple[Rows, Rows]]] = {
    "docstrings": demo.make_corpus,
    "graded": graded,
    "facts": facts,
}


# -- for benchmarks --------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, *, work: str, train: int, holdout: int) -> None:
    """The arguments of a benchmark on these corpora; `write` reads them."""
    parser.add_argument("--corpora", nargs="+", default=["docstrings"], help="made, or jsonl files")
    parser.add_argument("--train", type=int, default=train, help="training pairs")
    parser.add_argument("--holdout", type=int, default=holdout, help="held-out pairs")
    parser.add_argument("--flip", type=float, default=None, help="share of flipped training labels")
    parser.add_argument("--corpus-seed", type=int, default=0)
    parser.add_argument("--model", default=None, help="default: the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--work", default=work, help="folder of the runs")
    parser.add_argument("--out", default=None, help="result file or folder")


def write(name: str, arguments: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Write a corpus' files and the config of a run on it; their folder, and facts about it.

    Raises:
        BenchmarkError: `name` is neither a made corpus nor a file.
        CorpusError: The file cannot be used.
    """
    sizes = (arguments.train, arguments.holdout)
    options: dict[str, Any] = {"seed": arguments.corpus_seed}
    if arguments.flip is not None:
        options["flipped"] = arguments.flip
    path = Path(name)
    if name in MADE:
        train, holdout = MADE[name](*sizes, **options)
    elif path.is_file():
        train, holdout = from_file(path, *sizes, **options)
    else:
        raise BenchmarkError(f"{name!r} is neither a file nor a made corpus ({', '.join(MADE)})")
    folder = Path(arguments.work) / label(name)
    folder.mkdir(parents=True, exist_ok=True)
    for file, rows in (("train.jsonl", train), ("holdout.jsonl", holdout)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / file).write_text(text, encoding="utf-8")
    model = arguments.model or str(demo.cached_model())
    config = yaml.safe_load(demo.CONFIG.format(model=json.dumps(model)))
    config["corpus"]["max_bad_fraction"] = 1.0  # real corpora hold empty and equal sides
    flipped = sum(row["label_flipped"] for row in train)
    # Without a wrong label there is no purity to show.
    config["evaluate"]["flipped_column"] = "label_flipped" if flipped else None
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder, {"train": len(train), "holdout": len(holdout), "flipped": flipped}


def measure(
    question: str,
    arguments: argparse.Namespace,
    corpus: Callable[[str, argparse.Namespace], tuple[list[Row], dict[str, Any]]],
    **result: Any,
) -> int:
    """Measure each corpus, write the result and print its table; the exit code.

    Args:
        question: Of the benchmark.
        arguments: As `add_arguments` reads them.
        corpus: Rows of a corpus, and facts about it.
        **result: More of `write_result`.
    """
    rows: list[Row] = []
    data: dict[str, Any] = {}
    for name in arguments.corpora:
        found, data[label(name)] = corpus(name, arguments)
        rows += found
    config = {**vars(arguments), "corpora": [label(name) for name in arguments.corpora]}
    path = write_result(question, config=config, rows=rows, data=data, out=arguments.out, **result)
    print(markdown_table(load_result(path)))
    print(f"wrote {path}", file=sys.stderr)
    return 0


def label(name: str) -> str:
    """What a corpus is called in results: a file by its folder, if that says more."""
    path = Path(name)
    if name in MADE:
        return name
    return path.parent.name if path.stem in ("pairs", "train", "data") else path.stem
