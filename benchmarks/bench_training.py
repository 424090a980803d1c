"""How fast is a DPO step, and what does the reference model in memory cost?

    python benchmarks/bench_training.py --data hh pandalm --deepspeed zero2

Trains the same pairs, in the same order, from the same weights with four trainers, each in worker
processes of its own, in turn:

    ours, packed      refscale's trainer, packed steps, stored reference sums
    ours, padded      the same with TRL's padded steps
    trl, precompute   TRL's DPOTrainer that computes the reference sums itself before training
    trl, reference    TRL's DPOTrainer with the reference model in memory

Pairs are random ids whose lengths have the means of HH-RLHF (harmless) and PandaLM; the losses of
all four are in the result and agree, so the same was computed. A worker is a plain process, as a
launcher starts it. Costs, on two cores with SmolLM2-135M's shape, minutes for each row.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import BenchmarkError, Row, load_result, markdown_table, spread, write_result

from refscale import schema
from refscale.config import TrainConfig
from refscale.errors import ModelError

# Mean tokens of prompt, chosen, rejected: 48 pairs of HH's harmless test split in SmolLM2's tokens;
# PandaLM's instructions are short and its answers near-equal in length.
MEAN_TOKENS = {"hh": (117, 35, 47), "pandalm": (60, 45, 45)}
# Spread of the logarithm of a length: an assumption, long-tailed as such corpora are.
_LOG_SPREAD = 0.8
TRAINERS = ("ours, packed", "ours, padded", "trl, precompute", "trl, reference")
BASELINE = "trl, reference"


def main(argv: list[str] | None = None) -> int:
    """Measure and write the result; the exit code."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended too
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_model(args, work)
        rows: list[Row] = []
        facts: dict[str, Any] = {"model": model.name}
        for name in args.data:
            selection = work / f"{name}.parquet"
            facts[name] = make_selection(args, name, model, selection)
            for deepspeed in args.deepspeed:
                rows += measure(args, name, deepspeed, model, selection, work)
    path = write_result(
        "training",
        config={key: str(value) if key == "out" else value for key, value in vars(args).items()},
        rows=rows,
        units={"pairs_per_s": "1/s", "precompute_s": "s", "peak_memory": "GiB a worker"},
        data=facts,
        notes=[
            "pairs/s are of training steps alone; precompute is TRL's reference pass over the same"
            " pairs before them. Ours has its sums from scoring.",
            f"Lengths are lognormal with a spread of {_LOG_SPREAD} of the logarithm; only their"
            " means are those of the corpora.",
        ],
        out=args.out,
    )
    print(markdown_table(load_result(path)))
    print(f"written to {path}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="refscale bench training", description=__doc__)
    parser.add_argument("--data", nargs="+", choices=MEAN_TOKENS, default=list(MEAN_TOKENS))
    presets = ["none", "zero1", "zero2", "zero3"]
    parser.add_argument("--deepspeed", nargs="+", choices=presets, default=["zero2"])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--model", default="demo", help="demo, random, or a folder")
    parser.add_argument("--layers", type=int, default=30, help="of the random model")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker, on CPUs")
    parser.add_argument("--batch", type=int, default=4, help="pairs of a worker and step")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, after one warm-up")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file or folder; default: benchmarks/results")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.steps < 1:
        parser.error("--repeats and --steps must be at least 1")
    return args


# -- material --------------------------------------------------------------------------------------


def make_model(args: argparse.Namespace, work: Path) -> Path:
    """Folder of the model: the demo's, a random one of its shape, or a user's."""
    if args.model == "demo":
        from refscale.demo import cached_model

        try:
            return cached_model()
        except ModelError as exc:
            raise BenchmarkError(f"{exc}; or take --model random") from exc
    if args.model != "random":
        return Path(args.model)
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=args.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    folder = work / f"random-llama-{args.layers}-layers"
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def lengths(name: str, pairs: int, max_length: int, seed: int) -> np.ndarray:
    """Tokens of prompt, chosen and rejected, int64 (pairs, 3), within `max_length` together."""
    rng = np.random.default_rng(seed)
    means = np.array(MEAN_TOKENS[name])
    drawn = rng.lognormal(sigma=_LOG_SPREAD, size=(pairs, 3))
    counts = np.maximum(np.rint(drawn / drawn.mean(axis=0) * means), 1).astype(np.int64)
    longest = counts[:, 0] + counts[:, 1:].max(axis=1)
    over = np.maximum(longest - max_length, 0)
    counts[:, 0] = np.maximum(counts[:, 0] - over, 1)
    counts[:, 1:] = np.minimum(counts[:, 1:], max_length - counts[:, :1])
    return counts


def make_selection(args: argparse.Namespace, name: str, model: Path, path: Path) -> dict[str, Any]:
    """Write random pairs with their reference sums; mean lengths and seconds of scoring."""
    from refscale.scoring.reference import EncodedPairs, ReferenceModel

    pairs = args.batch * args.workers * (args.steps + 1)
    counts = lengths(name, pairs, args.max_length, args.seed)
    rng = np.random.default_rng(args.seed)
    ids = [
        [rng.integers(3, 40000, size=int(n)).astype(np.int32) for n in counts[:, side]]
        for side in range(3)
    ]
    started = time.perf_counter()
    reference = ReferenceModel.load(str(model), dtype="bfloat16" if args.bf16 else "float32")
    scores = reference.score(EncodedPairs(*ids))
    seconds = time.perf_counter() - started
    reference.release()
    keys = scores.chosen_logps - scores.rejected_logps
    table = pa.table(
        {
            "pair_id": [i.to_bytes(16, "big") for i in range(pairs)],
            "source": [name] * pairs,
            "prompt_ids": ids[0],
            "chosen_ids": ids[1],
            "rejected_ids": ids[2],
            "ref_chosen_logps": scores.chosen_logps,
            "ref_rejected_logps": scores.rejected_logps,
            "selection_key": keys,
        }
    )
    pq.write_table(schema.conform(table, schema.SELECTION, name), path)
    means = counts.mean(axis=0).round(1).tolist()
    return {"pairs": pairs, "mean_tokens": means, "scored_in_s": round(seconds, 2)}


# -- measuring -------------------------------------------------------------------------------------


def measure(
    args: argparse.Namespace, name: str, deepspeed: str, model: Path, selection: Path, work: Path
) -> list[Row]:
    """A row for each trainer; they take turns, so that what else the machine does hits all."""
    found: dict[str, list[dict[str, Any]]] = {trainer: [] for trainer in args.trainers}
    failed: dict[str, str] = {}
    for turn in range(args.repeats):
        for trainer in args.trainers:
            if trainer in failed:
                continue
            run = work / f"{name}-{deepspeed}-{trainer.replace(', ', '-')}-{turn}"
            plan = {
                "trainer": trainer,
                "deepspeed": None if deepspeed == "none" else deepspeed,
                "model": str(model),
                "selection": str(selection),
                "run": str(run),
                "batch": args.batch,
                "steps": args.steps,
                "max_length": args.max_length,
                "bf16": args.bf16,
                "threads": args.threads,
                "seed": args.seed,
            }
            result = launch(plan, args.workers, run)
            if isinstance(result, str):
                failed[trainer] = result
            else:
                found[trainer].append(result)
                print(
                    f"{name} {deepspeed} {trainer}: {result['pairs_per_s']:.3f} pairs/s", flush=True
                )
            shutil.rmtree(run, ignore_errors=True)
    baseline = found.get(BASELINE)
    rows = []
    for trainer, results in found.items():
        row: Row = {"data": name, "deepspeed": deepspeed, "trainer": trainer}
        if trainer in failed:
            rows.append({**row, "failed": failed[trainer]})
            continue
        row["pairs_per_s"] = spread([result["pairs_per_s"] for result in results])
        if baseline:
            theirs = np.median([result["pairs_per_s"] for result in baseline])
            row[f"times_{BASELINE}"] = float(row["pairs_per_s"]["median"] / theirs)
        precompute = [r["precompute_s"] for r in results if r["precompute_s"] is not None]
        row["precompute_s"] = spread(precompute) if precompute else None
        row["peak_memory"] = spread([result["peak_memory_gib"] for result in results])
        row["first_loss"], row["last_loss"] = results[-1]["losses"][0], results[-1]["losses"][-1]
        rows.append(row)
    return rows


def launch(plan: dict[str, Any], workers: int, run: Path) -> dict[str, Any] | str:
    """Train in `workers` processes; rank 0's result, or why there is none."""
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps(plan))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(workers):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(workers),
            "LOCAL_WORLD_SIZE": str(workers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(plan["threads"]),
            "HF_DATASETS_CACHE": str(run / "datasets"),
        }
        with open(run / f"rank{rank}.log", "w") as log:
            command = [sys.executable, __file__, "--rank", str(run / "plan.json")]
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    results = [run / f"result{rank}.json" for rank in range(workers)]
    if any(codes) or not all(path.exists() for path in results):
        lines = (run / "rank0.log").read_text().strip().splitlines()
        return f"exit codes {codes}: {lines[-1][:200] if lines else 'no output'}"
    per_rank = [json.loads(path.read_text()) for path in results]
    peak = max(result["peak_memory_gib"] for result in per_rank)
    return {**per_rank[0], "peak_memory_gib": peak}


# -- a worker --------------------------------------------------------------------------------------


def rank_main(plan: dict[str, Any]) -> None:
    """One rank's training; writes its result into the run's folder."""
    import torch

    torch.set_num_threads(plan["threads"])
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from refscale.training import packed_dpo
    from refscale.training.data import REF_COLUMNS, load_selection
    from refscale.training.dpo_trainer import PrecomputedDPOTrainer, peak_memory_gib
    from refscale.training.options import dpo_arguments
    from refscale.training.policy import load_policy
    from refscale.training.presets import Device
    from refscale.training.worker import WorkerSettings, join_ranks

    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ours = plan["trainer"].startswith("ours")
    train = TrainConfig.model_validate(
        {
            "deepspeed": plan["deepspeed"],
            "per_device_train_batch_size": plan["batch"],
            "max_steps": plan["steps"] + 1,
            "save_steps": 10**9,
            # The losses leave ln 2 within a few steps, so that equal ones say something.
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "seed": plan["seed"],
        }
    ).model_dump()
    arguments = dpo_arguments(
        train,
        output_dir=plan["run"],
        device=device,
        bf16=plan["bf16"],
        max_length=plan["max_length"],
    )
    arguments["save_strategy"] = "no"
    arguments["precompute_ref_log_probs"] = plan["trainer"] != "trl, reference"
    args = DPOConfig(**arguments, **join_ranks(arguments, device))
    settings = WorkerSettings(
        train=train,
        model_name_or_path=plan["model"],
        selection_files=[plan["selection"]],
        output_dir=plan["run"],
        policy_dir=plan["run"],
        max_length=plan["max_length"],
        bf16=plan["bf16"],
    )
    model, tokenizer = load_policy(settings, device)
    rank = int(os.environ["RANK"])
    # One folder for all ranks: TRL's precompute has rank 0 write what the others read.
    dataset = load_selection(settings.selection_files, f"{plan['run']}/datasets")
    ends: list[float] = []
    precompute_s: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    class OnIds(DPOTrainer):  # type: ignore[misc]
        """TRL's own trainer on the same ids; it would tokenise texts."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset.remove_columns(list(REF_COLUMNS))

        def _precompute_ref_logps(self, *args: Any) -> Any:
            started = time.perf_counter()
            computed = super()._precompute_ref_logps(*args)
            precompute_s.append(time.perf_counter() - started)
            return computed

        def _send_telemetry(self) -> None:
            pass

    common: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": dataset,
        "processing_class": tokenizer,
        "callbacks": [Clock()],
    }
    if ours:
        packed = plan["trainer"] == "ours, packed"
        reason = packed_dpo.refusal(model, torch.device(device)) if packed else None
        if reason:
            raise SystemExit(f"no packed steps: {reason}")
        trainer: DPOTrainer = PrecomputedDPOTrainer(**common, packed=packed)
    else:
        trainer = OnIds(**common)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    pairs = plan["batch"] * plan["steps"] * args.world_size
    result = {
        "pairs_per_s": pairs / (ends[-1] - ends[0]),
        "precompute_s": precompute_s[0] if precompute_s else None,
        "peak_memory_gib": peak_memory_gib(),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
    }
    (Path(plan["run"]) / f"result{rank}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(json.loads(Path(sys.argv[2]).read_text()))
    else:
        sys.exit(main())
