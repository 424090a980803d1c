"""How fast are pairs scored, and how exactly? The engine against its peers, on the same ids.

    refscale bench scoring --model smollm2-shape --dtype float32,bfloat16 --pairs 48 --repeats 5
    refscale bench scoring --model FOLDER --files pairs.jsonl
    refscale bench scoring --model llama-3.1-8b-shape --corpora ultrafeedback-like --pairs 512

All scorers of a corpus and dtype run in one process, warm, one after the other in each repeat, with
the bare matrix products of the model's shape among them: so the share of that ceiling is one of the
same minutes. The operations counted are those that the packed path needs, whoever spends more.
"""

import argparse
import gc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import scoring_baselines as baselines
import scoring_corpora as corpora
import scoring_models as models
import torch
from common import (
    BenchmarkError,
    Row,
    interleaved,
    load_result,
    markdown_table,
    spread,
    write_result,
)
from scoring_accuracy import accuracy

from refscale.progress import say
from refscale.scoring.devices import choose_dtype, default_budget, keep_freed_memory
from refscale.scoring.encoded_pairs import EncodedPairs
from refscale.scoring.packing import plan_packs

UNITS = {
    "pairs_per_s": "pairs/s",
    "tokens_per_s": "useful tokens/s",
    "times_trl": "ratio",
    "computed_tokens": "tokens a useful token",
    "gflops_per_s": "GFLOP/s",
    "ceiling_share": "ratio",
    "mfu": "ratio",
    "peak_memory_gib": "GiB",
    "largest_error_nats": "nats",
    "of_bare_process": "ratio",
    "replica_waits": "ratio",
}
TITLES = {
    "pairs_per_s": "pairs/s",
    "tokens_per_s": "useful tokens/s",
    "times_trl": "x TRL",
    "computed_tokens": "tokens computed a useful one",
    "gflops_per_s": "GFLOP/s",
    "ceiling_share": "share of products",
    "mfu": "MFU",
    "peak_memory_gib": "peak memory, GiB",
    "largest_error_nats": "largest error, nats",
    "spearman": "Spearman",
    "top_half_overlap": "top-half overlap",
    "of_bare_process": "of a bare process",
    "replica_waits": "replica waits",
}
_CEILING = "matrix products"


# What a peer may do with a model that it does not take: a row of the result, not its end.
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, ImportError, OSError)


def _reason(name: str, exc: Exception) -> str:
    reason = f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0][:120]}"
    say(f"{name} failed: {reason}")
    return reason


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="refscale bench scoring", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model",
        default="smollm2-shape",
        help=f"a model folder, or random weights: {', '.join(models.NAMES)}",
    )
    parser.add_argument("--dtype", default="auto", help="auto, or a list such as float32,bfloat16")
    parser.add_argument(
        "--corpora",
        default=None,
        help=f"made ones: {', '.join(corpora.NAMES)} (default: the first two and k4)",
    )
    parser.add_argument(
        "--files", type=Path, nargs="+", default=[], help="pairs; needs a model with a tokenizer"
    )
    parser.add_argument(
        "--common-tokens", type=int, default=0, help="with which all prompts of made corpora begin"
    )
    parser.add_argument("--pairs", type=int, default=48, help="of each corpus")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scorers", default=None, help="only those whose name holds one of these")
    parser.add_argument("--token-budget", type=int, default=None, help="of our forward passes")
    parser.add_argument("--oracle-pairs", type=int, default=48, help="compared with the oracle")
    parser.add_argument("--compile", action="store_true", help="also measure the compiled path")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: all cores")
    parser.add_argument("--through-ray", action="store_true", help="one replica against a process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="a .json file or a folder")
    arguments = parser.parse_args(argv)
    if arguments.pairs < 2 or arguments.repeats < 1:
        raise BenchmarkError("--pairs must be at least 2 and --repeats at least 1")
    if arguments.through_ray and arguments.threads:
        # The replica would still take them: an embedded Ray shares the cores out among processes.
        raise BenchmarkError("--through-ray measures with all cores, without --threads")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.corpora is None:
        arguments.corpora = "" if arguments.files else "hh-like,pandalm-like,k4"
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run, write the JSON result, print its table; the exit code."""
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer = models.tokenizer_of(arguments.model)
    config = models.build(arguments.model, torch.float32, torch.device("meta")).config
    vocab = config.get_text_config().vocab_size
    data = {
        name: corpora.make(
            name, arguments.pairs, vocab, arguments.seed, common_tokens=arguments.common_tokens
        )
        for name in filter(None, arguments.corpora.split(","))
    }
    if arguments.files and tokenizer is None:
        raise BenchmarkError(
            f"--files needs a model folder with a tokenizer, not {arguments.model}"
        )
    for path in arguments.files:
        data[path.stem] = corpora.read(path, arguments.pairs, arguments.model)
    rows: list[Row] = []
    missing: dict[str, None] = {}
    for dtype in _dtypes(arguments.dtype, device):
        truths = {name: _truth(arguments, device, pairs) for name, pairs in data.items()}
        model = models.build(arguments.model, dtype, device, arguments.seed)
        for name, pairs in data.items():
            say(f"{name}, {dtype}: {len(pairs)} pairs")
            rows += _corpus_rows(arguments, model, tokenizer, name, pairs, truths[name], missing)
        del model
        gc.collect()
    if arguments.through_ray:
        from scoring_through_ray import ray_rows

        for dtype in _dtypes(arguments.dtype, device):
            for name, pairs in data.items():
                rows += ray_rows(arguments, dtype, name, pairs)
    else:
        missing["the same through Ray (--through-ray)"] = None
    path = write_result(
        "scoring",
        config={**vars(arguments), "num_threads": torch.get_num_threads()},
        rows=rows,
        units=UNITS,
        titles=TITLES,
        columns=_columns(rows),
        data={name: corpora.describe(pairs) for name, pairs in data.items()},
        not_measured=list(missing),
        notes=_notes(arguments),
        out=arguments.out,
    )
    print(markdown_table(load_result(path)))
    say(f"wrote {path}")
    return 0


def _dtypes(asked: str, device: torch.device) -> list[torch.dtype]:
    return [choose_dtype(name, device)[0] for name in asked.split(",")]


def _columns(rows: list[Row]) -> list[str]:
    names = ["corpus", "dtype", "scorer", *TITLES, "failed"]
    return [name for name in names if any(row.get(name) is not None for row in rows)]


def _notes(arguments: argparse.Namespace) -> list[str]:
    notes = [
        f"Model {arguments.model}; {arguments.pairs} pairs a corpus, {arguments.repeats} repeats"
        " after one warm-up, the scorers in turn.",
        "Useful tokens: each prompt once, each distinct completion once. Shares count the"
        " operations of the packed path for every scorer.",
        "Errors are of sums, against one sequence at a time through the model in fp32 (fp64 below"
        " 50 million parameters), on the unrounded weights.",
        "Peak memory is what a scorer needs beyond the model, in its warm-up run.",
    ]
    if arguments.device == "cpu":
        notes.append(
            "All scorers of this process run with memory that is freed kept in the process, which"
            " is refscale's setting and helps the others too."
        )
    return notes


def _truth(arguments: argparse.Namespace, device: torch.device, pairs: EncodedPairs) -> Any:
    """The oracle's sums of the first pairs; its model is gone afterwards."""
    some = pairs.take(range(min(arguments.oracle_pairs, len(pairs))))
    model = models.build(arguments.model, torch.float32, device, arguments.seed)
    if sum(p.numel() for p in model.parameters()) < 50e6:
        model = model.double()
    found = baselines.oracle(model, some)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _corpus_rows(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    corpus: str,
    pairs: EncodedPairs,
    truth: baselines.Columns,
    missing: dict[str, None],
) -> list[Row]:
    """One row a scorer."""
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    with ExitStack() as stack:
        failed: dict[str, str] = {}
        own = baselines.as_loaded(model)
        scorers, order = _scorers(arguments, model, own, tokenizer, pairs, stack, missing, failed)
        columns: dict[str, baselines.Columns] = {}
        memory: dict[str, float] = {}
        for name, scorer in scorers.items():
            try:
                with models.PeakMemory(device) as peak:
                    columns[name] = scorer(pairs)
                assert peak.bytes is not None, "the block has ended"
                memory[name] = peak.bytes / 2**30
            except (
                RuntimeError,
                ValueError,
                TypeError,
                AttributeError,
                NotImplementedError,
            ) as exc:
                failed[name] = f"{type(exc).__name__}: {str(exc).splitlines()[0][:120]}"
                say(f"{name} failed: {failed[name]}")
        gemm = models.products_of(model, dtype, device)
        computed = {name: models.CountedTokens(model, own) for name in columns}
        seconds = interleaved(
            {
                _CEILING: gemm,
                **{
                    name: _waiting(scorers[name], pairs, device, computed[name]) for name in columns
                },
            },
            repeats=arguments.repeats,
            warmups=0,
            on_run=lambda name, took: say(f"  {took:8.2f} s  {name}"),
        )
    needed = _needed(model, pairs, arguments.token_budget)
    rate = gemm.flops / np.array(seconds[_CEILING])
    peak_rate = models.peak_flops_per_s(device)
    label = str(dtype).removeprefix("torch.")
    rows: list[Row] = [
        {
            "corpus": corpus,
            "dtype": label,
            "scorer": _CEILING,
            "gflops_per_s": spread(rate / 1e9),
            "mfu": spread(rate / peak_rate) if peak_rate else None,
        }
    ]
    for name in [*failed, *columns]:
        row: Row = {"corpus": corpus, "dtype": label, "scorer": name}
        if name in failed:
            rows.append({**row, "failed": failed[name]})
            continue
        took = np.array(seconds[name])
        speed = needed["flops"] / took
        row |= {
            "pairs_per_s": spread(len(pairs) / took),
            "tokens_per_s": spread(needed["useful_tokens"] / took),
            # Of scorers that compute elsewhere none are seen.
            "computed_tokens": computed[name].count / (arguments.repeats * needed["useful_tokens"])
            or None,
            "ceiling_share": spread(speed / rate),
            "gflops_per_s": spread(speed / 1e9),
            "mfu": spread(speed / peak_rate) if peak_rate else None,
            "peak_memory_gib": memory[name],
            **accuracy(columns[name], truth, order.get(name)),
        }
        if baselines.TRL in seconds:
            row["times_trl"] = spread(np.array(seconds[baselines.TRL]) / took)
        rows.append(row)
    return rows


def _scorers(
    arguments: argparse.Namespace,
    model: Any,
    own: Any,
    tokenizer: Any,
    pairs: EncodedPairs,
    stack: ExitStack,
    missing: dict[str, None],
    failed: dict[str, str],
) -> tuple[dict[str, baselines.Scorer], dict[str, np.ndarray]]:
    """The scorers by name, and for those that answer in another order, which.

    The engine's take the model `own`, all others `model`.
    """
    wanted = arguments.scorers.split(",") if arguments.scorers else None
    scorers: dict[str, baselines.Scorer] = {}
    order: dict[str, np.ndarray] = {}
    tokenizer = tokenizer or models.stand_in_tokenizer(model)
    on_cpu = arguments.device == "cpu"

    def add(name: str, make: Callable[[], baselines.Scorer]) -> None:
        if wanted is not None and not any(part in name for part in wanted):
            return
        try:
            scorers[name] = make()
        except _FAILURES as exc:
            failed[name] = _reason(name, exc)

    def optional(name: str, module: str, make: Callable[[], baselines.Scorer]) -> None:
        if baselines.installed(module):
            add(name, make)
        else:
            missing[f"{name}: {module} is not installed"] = None

    # TRL puts its fused head on the model, which changes nothing for the others.
    add(baselines.TRL, lambda: stack.enter_context(baselines.trl_precompute(model, tokenizer)))
    add(baselines.HF, lambda: baselines.hf_padded(model))
    add(baselines.HF_SORTED, lambda: baselines.hf_sorted(model))
    for name, kind in ((baselines.CT2, "float32"), (baselines.CT2_INT8, "int8")):
        if not on_cpu or model.dtype != torch.float32:
            # On CPUs it has float32 and int8; measured in the float32 run.
            continue

        def make(kind: str = kind) -> baselines.Scorer:
            return stack.enter_context(baselines.ctranslate2(model, tokenizer, kind))

        optional(name, "ctranslate2", make)
    optional(baselines.LM_EVAL, "lm_eval", lambda: baselines.lm_eval(model, tokenizer))
    packed, score = baselines.ours(own, "packed", arguments.token_budget)
    add(baselines.PADDED, lambda: baselines.ours(own, "padded", arguments.token_budget)[1])
    parts = corpora.one_pair_a_prompt(pairs)
    if len(parts) > 1:
        add(baselines.PAIR_BY_PAIR, lambda: baselines.pair_by_pair(packed, parts))
        order[baselines.PAIR_BY_PAIR] = corpora.order_of_parts(pairs)
    add(baselines.PACKED, lambda: score)
    if arguments.compile:
        compiled = baselines.ours(own, "packed", arguments.token_budget, compilation="on")[1]
        add(baselines.COMPILED, lambda: compiled)
    if not scorers:
        raise BenchmarkError(f"--scorers {arguments.scorers} names none of the scorers")
    return scorers, order


def _waiting(
    scorer: baselines.Scorer,
    pairs: EncodedPairs,
    device: torch.device,
    tokens: models.CountedTokens,
) -> Callable[[], None]:
    def run() -> None:
        with tokens:
            scorer(pairs)
        models.wait(device)

    return run


def _needed(model: Any, pairs: EncodedPairs, token_budget: int | None) -> dict[str, float]:
    """Operations and useful tokens of the packed path."""
    from refscale.scoring.flops import Flops

    flops = Flops.of(model)
    token_budget = token_budget or default_budget(
        model.config.get_text_config(), model.dtype, model.device
    )
    plan = plan_packs(pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids, token_budget)
    return {
        "useful_tokens": plan.useful_tokens,
        "flops": sum(flops.total(p.num_tokens, len(p.rows), p.context) for p in plan.iter_packs()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
