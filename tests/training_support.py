"""What the tests of training share: a tiny model, a selection scored by it, a worker's settings."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer

from refscale import schema
from refscale.config import TrainConfig
from refscale.training.data import load_selection
from refscale.training.dpo_trainer import PrecomputedDPOTrainer
from refscale.training.options import dpo_arguments
from refscale.training.worker import WorkerSettings, run_worker

torch.set_num_threads(1)  # more only wait for each other on such small tensors

VOCAB = 64
LN2 = math.log(2)


def save_tiny_llama(folder: Path, seed: int = 0, **changes: Any) -> None:
    """Two layers, grouped-query attention; weights large enough that log-probs are not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **changes,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t3"
    ).save_pretrained(folder)


def sums(model: Any, prompt: list[int], completion: list[int]) -> float:
    """Sum of completion log-probs by a plain forward of one unpadded sequence."""
    ids = torch.tensor(prompt + completion)
    with torch.no_grad():
        logps = model(ids[None]).logits[0].float().log_softmax(-1)
    first = max(len(prompt), 1)
    return sum(float(logps[t - 1, ids[t]]) for t in range(first, len(ids)))


def selection_rows(model: Any, n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        prompt, chosen, rejected = (
            rng.integers(3, VOCAB, size=int(rng.integers(low, high))).tolist()
            for low, high in ((1, 12), (1, 10), (1, 14))
        )
        ref = sums(model, prompt, chosen), sums(model, prompt, rejected)
        rows.append(
            {
                "pair_id": i.to_bytes(16, "big"),
                "source": "s",
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "ref_chosen_logps": ref[0],
                "ref_rejected_logps": ref[1],
                "selection_key": ref[0] - ref[1],
            }
        )
    return rows


def write_selection(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.SELECTION), path)
    return str(path)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def rows(model_dir: Path) -> list[dict[str, Any]]:
    return selection_rows(AutoModelForCausalLM.from_pretrained(model_dir), 24)


def train_config(**changes: Any) -> dict[str, Any]:
    fields = {
        "deepspeed": None,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": 1000,
        "max_steps": 3,
        "packed": "auto",
    }
    return TrainConfig.model_validate({**fields, **changes}).model_dump()


@pytest.fixture
def settings(tmp_path: Path, model_dir: Path, rows: list[dict[str, Any]]) -> WorkerSettings:
    return WorkerSettings(
        train=train_config(),
        model_name_or_path=str(model_dir),
        selection_files=[write_selection(tmp_path / "selection.parquet", rows)],
        output_dir=str(tmp_path / "checkpoints"),
        policy_dir=str(tmp_path / "policy"),
        max_length=64,
        cache_dir=str(tmp_path / "cache"),
    )


def run(settings: WorkerSettings, **kwargs: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    logs: list[dict[str, Any]] = []
    saved = kwargs.pop("on_save", lambda folder, metrics: None)
    return run_worker(settings, on_log=logs.append, on_save=saved, **kwargs), logs


def changed(settings: WorkerSettings, **changes: Any) -> WorkerSettings:
    return dataclasses.replace(settings, train=train_config(**changes))


def make_trainer(
    settings: WorkerSettings, cls: Callable[..., DPOTrainer] = PrecomputedDPOTrainer, **changes: Any
) -> DPOTrainer:
    """A trainer on the selection without `run_worker`'s callbacks."""
    arguments = dpo_arguments(
        settings.train, output_dir=settings.output_dir, device="cpu", bf16=False, max_length=64
    )
    return cls(
        model=AutoModelForCausalLM.from_pretrained(settings.model_name_or_path),
        args=DPOConfig(**{**arguments, **changes}),
        train_dataset=load_selection(settings.selection_files, settings.cache_dir),
        processing_class=AutoTokenizer.from_pretrained(settings.model_name_or_path),
    )
