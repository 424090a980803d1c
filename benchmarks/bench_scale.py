"""Does the cost of a run grow linearly, and does its driver's memory stay flat?

In: numbers of pairs. Out: a row for each number and stage: seconds, pairs/s, time per pair against
that of the smallest number, and the driver's peak memory. The benchmark makes the corpus (about 100
bytes, hence tokens, a pair) and a random Llama of 60,000 parameters with a byte tokenizer, so the
model costs as little as a model can: what is measured is everything around it.

Each number runs in a driver of its own on an embedded Ray, which is started before the clock.
"""

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench_selection import peak_bytes
from common import BenchmarkError, load_result, markdown_table, write_result

_WORDS = "red green blue north south river stone cloud seven eleven quick slow bird tree".split()
_STAGES = ("prepare", "score", "select")


def save_model(folder: Path) -> Path:
    """A random Llama of 60,000 parameters and its byte tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_corpus(path: Path, count: int) -> None:
    """`count` different pairs of about 100 bytes as JSON lines."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(low, high)))

    with path.open("w") as file:
        for i in range(count):
            file.write(
                f'{{"prompt": "Question {i}: {text(2, 6)}?", "chosen": " {text(2, 8)} {i}",'
                f' "rejected": " {text(2, 8)} no"}}\n'
            )


def drive(pipe: Connection, config: dict[str, Any], run_dir: str) -> None:
    """Run the stages; send {stage: figures}, "started" first."""
    import torch

    from refscale import pipeline
    from refscale.cluster.runtime import disconnect
    from refscale.config import parse_config
    from refscale.run import Run, claim
    from refscale.storage.store import Store

    torch.set_num_threads(1)
    run = Run(Store(run_dir), parse_config(config))
    claim(run)
    started = time.monotonic()
    _ = run.cluster
    found: dict[str, Any] = {"ray_start_s": time.monotonic() - started}
    for stage in _STAGES:
        started = time.monotonic()
        manifest = getattr(pipeline, stage)(run)
        found[stage] = {
            "seconds": time.monotonic() - started,
            "driver_memory_mib": peak_bytes() / 2**20,
            "counts": manifest["counts"],
            "replica_pairs_per_s": manifest["details"].get("pairs_per_s"),
            "replica_wait_share": manifest["details"].get("wait_share"),
            "tokens": manifest["details"].get("useful_tokens"),
        }
    disconnect()
    pipe.send(found)


def measure(pairs: int, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run over `pairs` pairs.

    Raises:
        BenchmarkError: The driver failed.
    """
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        corpus = Path(folder, "pairs.jsonl")
        write_corpus(corpus, pairs)
        config = {
            "model": {"model_name_or_path": str(model), "dtype": "float32"},
            "corpus": {"sources": [{"path": str(corpus)}], "shard_pairs": arguments.shard_pairs},
            "encoding": {"max_length": 512},
            "ray": {"replicas": arguments.replicas},
        }
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        driver = context.Process(target=drive, args=(there, config, str(Path(folder, "run"))))
        driver.start()
        there.close()
        try:
            found: dict[str, Any] = here.recv()
        except EOFError as exc:
            driver.join()
            raise BenchmarkError(
                f"the driver of {pairs} pairs ended with {driver.exitcode}"
            ) from exc
        driver.join()
    if found["score"]["counts"]["scored"] != pairs:
        raise BenchmarkError(f"of {pairs} pairs {found['score']['counts']} were scored")
    return found


def main(argv: list[str]) -> int:
    """Measure, write the result, print its table."""
    parser = argparse.ArgumentParser(prog="refscale bench scale", description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--shard-pairs", type=int, default=2000)
    parser.add_argument("--work-dir", help="where corpora and runs are made; default: the system's")
    parser.add_argument("--out", help="file or folder of the result")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        model = save_model(Path(folder, "model"))
        for pairs in sorted(arguments.pairs):
            found = measure(pairs, model, arguments)
            for stage in _STAGES:
                figures = found[stage]
                each = figures["seconds"] / pairs
                rows.append(
                    {
                        "stage": stage,
                        "pairs": pairs,
                        "seconds": figures["seconds"],
                        "pairs_per_s": 1 / each,
                        "time_per_pair_ratio": each / first.setdefault(stage, each),
                        "driver_memory_mib": figures["driver_memory_mib"],
                        "replica_pairs_per_s": figures["replica_pairs_per_s"],
                        "replica_wait_share": figures["replica_wait_share"],
                    }
                )
    path = write_result(
        "scale",
        config=vars(arguments),
        rows=rows,
        units={"seconds": "s", "driver_memory_mib": "MiB"},
        notes=[
            "time per pair ratio: against the smallest number of pairs; below 1 where the fixed"
            " costs of a stage are spread over more pairs",
            "driver memory: the largest resident memory so far of the one process that all stages"
            " of a run share",
        ],
        out=arguments.out,
    )
    print(markdown_table(load_result(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
