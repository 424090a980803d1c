"""Two ranks: each DeepSpeed preset, LoRA and token-budget batches train, save and resume.

The ranks are plain processes, started as a launcher would, and do all trainings in turn; Ray
Train's own part is in test_train_failures.py.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

STEPS, SAVE_STEPS, BATCH, PAIRS = 6, 4, 3, 24

pytestmark = pytest.mark.slow


def make_inputs(folder: Path) -> None:
    """A tiny model, its tokenizer, and a selection with its true reference sums."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from refscale import schema

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t3"
    ).save_pretrained(folder / "model")

    rng = np.random.default_rng(0)
    rows = []
    for i in range(PAIRS):
        prompt, *completions = (
            rng.integers(3, 64, size=int(rng.integers(1, 12))).tolist() for _ in range(3)
        )
        ref = []
        for completion in completions:
            ids = torch.tensor(prompt + completion)
            with torch.no_grad():
                logps = model(ids[None]).logits[0].log_softmax(-1)
            ref.append(sum(float(logps[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        rows.append(
            {
                "pair_id": i.to_bytes(16, "big"),
                "source": "s",
                "prompt_ids": prompt,
                "chosen_ids": completions[0],
                "rejected_ids": completions[1],
                "ref_chosen_logps": ref[0],
                "ref_rejected_logps": ref[1],
                "selection_key": ref[0] - ref[1],
            }
        )
    table = pa.Table.from_pylist(rows, schema=schema.SELECTION)
    pq.write_table(table, folder / "selection.parquet")


def settings_of(inputs: Path, out: Path, **train: Any) -> dict[str, Any]:
    return {
        "train": {
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-3,
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 5,
            "packed": "on",
            **train,
        },
        "model_name_or_path": str(inputs / "model"),
        "selection_files": [str(inputs / "selection.parquet")],
        "output_dir": str(out / "checkpoints"),
        "policy_dir": str(out / "policy"),
        "max_length": 64,
        "cache_dir": str(out / "cache"),
    }


def launch(out: Path, runs: list[dict[str, Any]]) -> tuple[list[int], list[dict[str, Any]]]:
    """Run each of `runs` in turn in the same two ranks; exit codes and rank 0's results."""
    out.mkdir(parents=True, exist_ok=True)
    plan = out / "plan.json"
    plan.write_text(json.dumps(runs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        log = open(out / f"rank{rank}.log", "w")
        command = [sys.executable, __file__, str(plan)]
        ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    result = out / "results.json"
    return codes, json.loads(result.read_text()) if result.exists() else []


def own_copy(checkpoint: str, fields: dict[str, Any], *, best: bool = False) -> str:
    """The checkpoint as it is on a node of this rank alone: what it reads."""
    from refscale.training.checkpoints import files_to_load

    source, rank = Path(checkpoint), int(os.environ["RANK"])
    target = Path(fields["output_dir"]).parent / f"node-{rank}" / source.name
    names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    own, shared = files_to_load(names, fields["train"], rank, best=best)
    for name in [*own, *shared]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).symlink_to(source / name)
    return str(target)


def rank_main(plan: Path) -> None:
    """What each rank runs."""
    import torch

    from refscale.config import TrainConfig
    from refscale.training.worker import WorkerSettings, run_worker

    results = []
    for run in json.loads(plan.read_text()):
        fields = {**run["settings"]}
        fields["train"] = TrainConfig.model_validate(fields["train"]).model_dump()
        logs: list[dict[str, Any]] = []
        saved: list[list[Any]] = []

        def on_save(folder: str, metrics: dict[str, Any], saved: list = saved) -> None:
            # Every rank's part is there when any rank is told.
            saved.append([folder, sorted(os.listdir(folder))])

        def first_checkpoint(saved: list = saved, fields: dict = fields) -> Any:
            return contextlib.nullcontext(own_copy(saved[0][0], fields, best=True))

        resume_from = run.get("resume_from")
        metrics = run_worker(
            WorkerSettings(**fields),
            on_log=logs.append,
            on_save=on_save,
            resume_from=resume_from and own_copy(resume_from, fields),
            best_checkpoint=first_checkpoint,
        )
        results.append({"metrics": metrics, "logs": logs, "saved": saved})
    if os.environ["RANK"] == "0":
        plan.with_name("results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def assert_same_policy(a: Path, b: Path, tolerance: float) -> None:
    from safetensors.torch import load_file

    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        difference = float((tensor - second[name]).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


PRESETS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
TRAININGS: dict[str, dict[str, Any]] = {
    "ddp": {"deepspeed": None, "packed": "off"},
    **{preset: {"deepspeed": preset} for preset in PRESETS},
    "lora": {"deepspeed": "zero2", "peft": LORA, "gradient_checkpointing": True},
    # 24 pairs of 3 to 33 tokens: about four a micro-batch, and so two epochs in six steps.
    "tokens": {"deepspeed": "zero2", "token_budget": 90},
    "bf16": {"deepspeed": "zero3", "trl": {"accelerator_config": {"even_batches": True}}},
}
BEST = ("ddp", "zero3", "lora")  # end with the weights of their first checkpoint
LN2 = 0.693147


@dataclass(frozen=True)
class Trained:
    """Where the inputs and trainings lie, and rank 0's results of each."""

    inputs: Path
    out: Path
    results: dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All trainings, whole and resumed, in two processes for all of them.

    Of several processes of tests, and of the modules that import this, one does them.
    """
    base = tmp_path_factory.getbasetemp()
    # The folders of xdist's processes lie in one of them all.
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    done = out / "trained.json"
    with FileLock(f"{out}.lock"):
        if not done.exists():
            done.write_text(json.dumps(train_all(out)))
    return Trained(out / "inputs", out, json.loads(done.read_text()))


def train_all(out: Path) -> dict[str, dict[str, Any]]:
    """Rank 0's result of each training."""
    inputs = out / "inputs"
    make_inputs(inputs)
    runs, names = [], []
    for name, train in TRAININGS.items():
        checkpoint = out / name / "checkpoints" / f"checkpoint-{SAVE_STEPS}"
        for kind, resume in ((name, None), (f"{name}-resumed", str(checkpoint))):
            settings = settings_of(inputs, out / kind, **train)
            settings["bf16"] = name == "bf16"
            runs.append({"settings": settings, "resume_from": resume})
            names.append(kind)
    runs, names = runs[:-1], names[:-1]  # bf16 need not be resumed
    best = {"eval_steps": SAVE_STEPS, "load_best_model_at_end": True}
    for name in BEST:
        settings = settings_of(inputs, out / f"{name}-best", **TRAININGS[name], **best)
        settings["holdout_files"] = settings["selection_files"]  # only what is done with it counts
        runs.append({"settings": settings})
        names.append(f"{name}-best")
    codes, results = launch(out, runs)
    assert codes == [0, 0], (out / "rank0.log").read_text()[-3000:]
    return dict(zip(names, results, strict=True))


def losses(result: dict[str, Any]) -> list[float]:
    return [log["loss"] for log in result["logs"]]


@pytest.mark.parametrize("name", [name for name in TRAININGS if name != "bf16"])
def test_each_trains_saves_and_resumes_exactly(trained: Trained, name: str) -> None:
    out, results = trained.out, trained.results
    whole, resumed = results[name], results[f"{name}-resumed"]
    # ln 2, through partitioned weights too
    assert whole["logs"][0]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert whole["metrics"]["start_check_loss"] == pytest.approx(LN2, abs=1e-5)
    assert whole["metrics"]["train_path"].startswith("padded" if name == "ddp" else "packed")
    # A checkpoint holds both ranks' random states and optimizer shards when it is reported.
    assert [Path(folder).name for folder, _ in whole["saved"]] == ["checkpoint-4", "checkpoint-6"]
    folder, files = whole["saved"][0]
    assert {"rng_state_0.pth", "rng_state_1.pth", "refscale_checkpoint.json"} <= set(files)
    if name != "ddp":
        shards = Path(folder).glob(f"global_step{SAVE_STEPS}/*optim_states.pt")
        assert len(list(shards)) == 2
    assert [log["step"] for log in resumed["logs"]] == [5, 6]
    np.testing.assert_allclose(losses(resumed), losses(whole)[4:], atol=1e-6)
    assert_same_policy(out / f"{name}-resumed" / "policy", out / name / "policy", 1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_zero_only_partitions_and_packs_only_pack(trained: Trained, preset: str) -> None:
    from transformers import AutoModelForCausalLM

    out, results = trained.out, trained.results
    # The losses and weights of padded data parallelism without DeepSpeed, in float32.
    np.testing.assert_allclose(losses(results[preset]), losses(results["ddp"]), atol=1e-5)
    assert_same_policy(out / preset / "policy", out / "ddp" / "policy", 1e-4)
    AutoModelForCausalLM.from_pretrained(out / preset / "policy")


@pytest.mark.parametrize("name", BEST)
def test_the_best_checkpoint_becomes_the_policy(trained: Trained, name: str) -> None:
    from transformers import AutoModelForCausalLM

    out, result = trained.out, trained.results[f"{name}-best"]
    assert result["metrics"]["policy_step"] == SAVE_STEPS and result["metrics"]["steps"] == STEPS
    np.testing.assert_allclose(result["logs"][0]["loss"], losses(trained.results[name])[0])
    # The holdout is the selection: its loss is below ln 2 once it is trained on.
    measured = [log["eval_loss"] for log in result["logs"] if "eval_loss" in log]
    assert len(measured) == 2 and measured[1] < measured[0] < LN2
    policy = AutoModelForCausalLM.from_pretrained(out / f"{name}-best" / "policy").state_dict()
    last = AutoModelForCausalLM.from_pretrained(out / name / "policy").state_dict()
    assert any(not weight.equal(last[key]) for key, weight in policy.items())
    saved = Path(result["saved"][0][0])
    if name == "ddp":  # the others' checkpoints hold partitions or an adapter
        first = AutoModelForCausalLM.from_pretrained(saved).state_dict()
        assert all(weight.equal(first[key]) for key, weight in policy.items())
    if name == "lora":
        from safetensors.torch import load_file

        written = load_file(out / "lora-best/policy/adapter/adapter_model.safetensors")
        checkpoint = load_file(saved / "adapter_model.safetensors")
        assert all(weight.equal(checkpoint[key]) for key, weight in written.items())


def test_lora_writes_its_adapter_beside_the_merged_policy(trained: Trained) -> None:
    out = trained.out
    assert (out / "lora" / "policy" / "adapter" / "adapter_model.safetensors").is_file()


def test_token_budget_batches_go_on_in_the_second_epoch(trained: Trained) -> None:
    logs = trained.results["tokens"]["logs"]
    assert 1 < logs[SAVE_STEPS - 1]["epoch"] < 2  # the checkpoint that was resumed from


def test_bfloat16_under_zero3_keeps_the_stored_sums(trained: Trained) -> None:
    from safetensors.torch import load_file

    out, results = trained.out, trained.results
    # Sums near -40 nats have a bfloat16 step of 0.25; rounded ones would move the loss by more.
    assert losses(results["bf16"])[0] == pytest.approx(LN2, abs=2e-3)
    weights = load_file(out / "bf16" / "policy" / "model.safetensors")
    assert str(weights.popitem()[1].dtype) == "torch.bfloat16"


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
