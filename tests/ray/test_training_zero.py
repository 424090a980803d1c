"""Two ranks: each DeepSpeed preset trains, saves, resumes and survives a killed rank.

The ranks are plain processes, started as a launcher would; Ray Train's own part is tested with the
pipeline.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

STEPS, SAVE_STEPS, BATCH, PAIRS = 6, 4, 3, 24
KILLED = 17

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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def settings_of(inputs: Path, out: Path, **train: Any) -> dict[str, Any]:
    return {
        "train": {
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-3,
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 5,
            "packed": "off",
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


def rank_main(plan: Path) -> None:
    """What each rank runs."""
    from refscale.config import TrainConfig
    from refscale.training import WorkerSettings, run_worker

    results = []
    for run in json.loads(plan.read_text()):
        fields = {**run["settings"]}
        fields["train"] = TrainConfig.model_validate(fields["train"]).model_dump()
        logs: list[dict[str, Any]] = []
        saved: list[list[Any]] = []

        def on_save(folder: str, metrics: dict[str, Any], saved: list = saved) -> None:
            # Every rank's part is there when any rank is told.
            saved.append([folder, sorted(os.listdir(folder))])

        if run.get("kill_at_step") and os.environ["RANK"] == "1":
            kill_at_step(run["kill_at_step"])
        metrics = run_worker(
            WorkerSettings(**fields),
            on_log=logs.append,
            on_save=on_save,
            resume_from=run.get("resume_from"),
        )
        results.append({"metrics": metrics, "logs": logs, "saved": saved})
    if os.environ["RANK"] == "0":
        plan.with_name("results.json").write_text(json.dumps(results))


def kill_at_step(step: int) -> None:
    """End this process, without any clean-up, in the middle of a step."""
    from refscale.training import PrecomputedDPOTrainer

    compute_loss = PrecomputedDPOTrainer.compute_loss

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            os._exit(KILLED)
        return compute_loss(self, *args, **kwargs)

    PrecomputedDPOTrainer.compute_loss = dying


def assert_same_policy(a: Path, b: Path, tolerance: float) -> None:
    from safetensors.torch import load_file

    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        difference = float((tensor - second[name]).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


@pytest.fixture(scope="module")
def ddp(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Policy and losses of two ranks without DeepSpeed, which every preset must reproduce."""
    out = tmp_path_factory.mktemp("ddp")
    codes, results = launch(out, [{"settings": settings_of(inputs, out, deepspeed=None)}])
    assert codes == [0, 0], (out / "rank0.log").read_text()[-2000:]
    return out / "policy", [log["loss"] for log in results[0]["logs"]]


@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_each_preset_trains_saves_and_resumes(
    inputs: Path, tmp_path: Path, ddp: tuple[Path, list[float]], preset: str
) -> None:
    from transformers import AutoModelForCausalLM

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    checkpoint = whole / "checkpoints" / f"checkpoint-{SAVE_STEPS}"
    runs = [
        {"settings": settings_of(inputs, whole, deepspeed=preset)},
        {
            "settings": settings_of(inputs, resumed, deepspeed=preset),
            "resume_from": str(checkpoint),
        },
    ]
    codes, results = launch(tmp_path, runs)
    assert codes == [0, 0], (tmp_path / "rank0.log").read_text()[-2000:]
    first, second = results
    # ln 2, through partitioned weights too
    assert first["logs"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["metrics"]["start_check_loss"] == pytest.approx(0.693147, abs=1e-5)
    # ZeRO only partitions: the same losses and weights as plain data parallelism in fp32.
    np.testing.assert_allclose([log["loss"] for log in first["logs"]], ddp[1], atol=1e-5)
    assert_same_policy(whole / "policy", ddp[0], 1e-4)
    AutoModelForCausalLM.from_pretrained(whole / "policy")
    # A checkpoint holds both ranks' optimizer shards and random states when it is reported.
    assert [Path(folder).name for folder, _ in first["saved"]] == ["checkpoint-4", "checkpoint-6"]
    files = first["saved"][0][1]
    assert {"rng_state_0.pth", "rng_state_1.pth", "refscale_checkpoint.json"} <= set(files)
    shards = list((checkpoint / f"global_step{SAVE_STEPS}").glob("*optim_states.pt"))
    assert len(shards) == 2
    assert [log["step"] for log in second["logs"]] == [5, 6]
    assert_same_policy(resumed / "policy", whole / "policy", 1e-6)


def test_lora_under_zero2_trains_resumes_and_merges(inputs: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train = {"deepspeed": "zero2", "peft": lora, "gradient_checkpointing": True}
    runs = [
        {"settings": settings_of(inputs, whole, **train)},
        {
            "settings": settings_of(inputs, resumed, **train),
            "resume_from": str(whole / "checkpoints" / f"checkpoint-{SAVE_STEPS}"),
        },
    ]
    codes, results = launch(tmp_path, runs)
    assert codes == [0, 0], (tmp_path / "rank0.log").read_text()[-2000:]
    assert results[0]["logs"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert (whole / "policy" / "adapter" / "adapter_model.safetensors").is_file()
    assert_same_policy(resumed / "policy", whole / "policy", 1e-6)


def test_bfloat16_under_zero3_keeps_the_stored_sums(inputs: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    runs = [
        {"settings": {**settings_of(inputs, tmp_path, deepspeed="zero3"), "bf16": True}},
    ]
    codes, results = launch(tmp_path, runs)
    assert codes == [0, 0], (tmp_path / "rank0.log").read_text()[-2000:]
    # Sums near -40 nats have a bfloat16 step of 0.25; rounded ones would move the loss by more.
    assert results[0]["logs"][0]["loss"] == pytest.approx(0.693147, abs=2e-3)
    assert str(load_file(tmp_path / "policy" / "model.safetensors").popitem()[1].dtype) == (
        "torch.bfloat16"
    )


def test_a_rank_killed_in_a_step_costs_the_steps_since_the_checkpoint(
    inputs: Path, tmp_path: Path, ddp: tuple[Path, list[float]]
) -> None:
    settings = settings_of(inputs, tmp_path, deepspeed="zero2")
    codes, _ = launch(tmp_path, [{"settings": settings, "kill_at_step": 6}])
    assert codes[1] == KILLED
    assert codes[0] != 0
    checkpoint = tmp_path / "checkpoints" / f"checkpoint-{SAVE_STEPS}"
    codes, results = launch(tmp_path, [{"settings": settings, "resume_from": str(checkpoint)}])
    assert codes == [0, 0], (tmp_path / "rank0.log").read_text()[-2000:]
    assert [log["step"] for log in results[0]["logs"]] == [5, 6]
    # The same weights as an undisturbed run, to float32 rounding.
    assert_same_policy(tmp_path / "policy", ddp[0], 1e-4)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
