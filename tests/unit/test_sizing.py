"""`refscale plan`: hand-derived figures of Llama-3.1-8B, and the engine's own count."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from support import string_pairs, write_jsonl

from refscale.config import parse_config
from refscale.errors import ConfigError, ModelError
from refscale.selection.order import Group, SelectionSpec
from refscale.sizing import footprint
from refscale.sizing.footprint import Assumptions, model_shape, parse_gpus
from refscale.sizing.lengths import of_means, of_pairs, of_run, of_sources, read_means
from refscale.sizing.plan import plan, size_run
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]
# q and o 2 * 4096^2, k and v 2 * 4096 * 1024, MLP 3 * 4096 * 14336, in 32 layers.
BACKBONE = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
# Two vocabulary matrices, and two norms a layer plus the last.
PARAMETERS = BACKBONE + 2 * 128256 * 4096 + 65 * 4096


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama-8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory):
    """Llama-3.1-70B: 131.4 GiB in bf16, 39.8 with its layers in 4 bits."""
    folder = tmp_path_factory.mktemp("llama-70b")
    larger = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, **larger}))
    return folder


def make_config(model, **sections):
    values = {
        "model": {"model_name_or_path": str(model)},
        "corpus": {"sources": [{"path": "unused.jsonl"}]},
        **sections,
    }
    return parse_config(values)


def test_the_shape_is_read_from_config_json_alone(llama):
    assert [path.name for path in llama.iterdir()] == ["config.json"]
    shape = model_shape(make_config(llama))
    assert PARAMETERS == 8_030_261_248  # as published
    assert shape.parameters == shape.trainable == PARAMETERS
    assert shape.flops_per_token == 2 * BACKBONE == 13_958_643_712
    assert shape.flops_per_head_row == 2 * 128256 * 4096
    assert shape.flops_per_context == 4 * 32 * 32 * 128


def test_gpu_hours_of_a_million_pairs_on_llama_8b(llama):
    lengths = of_means(1_000_000, 400, 400, 400)
    assumed = Assumptions(scoring_mfu=0.6, training_mfu=0.5, price_per_gpu_hour=2.0)
    sizing = plan(
        make_config(llama, select={"fraction": 0.1}, ray={"replicas": 8}),
        lengths,
        gpus="8xH100",
        assumptions=assumed,
    )
    # Prompt once, and all but the last token of both completions.
    tokens = 1e6 * (400 + 399 + 399)
    head = 1e6 * (400 + 400)
    context = 1e6 * (400 * 401 / 2 + 2 * (399 * 400 + 399 * 400 / 2))
    flops = tokens * 2 * BACKBONE + head * 2 * 128256 * 4096 + context * 4 * 32 * 32 * 128
    assert sizing.flops["scoring"] == pytest.approx(flops, rel=1e-12)
    # 1.786e19 FLOP at 60 % of 989 TFLOP/s: 8.36 GPU hours, an hour and a bit on 8 GPUs.
    assert sizing.gpu_hours["scoring"] == pytest.approx(flops / (0.6 * 989e12) / 3600)
    assert sizing.gpu_hours["scoring"] == pytest.approx(8.36, abs=0.01)
    assert sizing.hours["scoring"] == pytest.approx(sizing.gpu_hours["scoring"] / 8)
    # A tenth of the pairs, forward and backward, no reference pass.
    assert sizing.flops["training"] == pytest.approx(0.1 * 3 * flops)
    # Training is on one GPU (train.num_workers), and the other seven are paid for meanwhile.
    assert sizing.hours["training"] == sizing.gpu_hours["training"]
    reserved = sizing.gpu_hours["scoring"] + 8 * sizing.gpu_hours["training"]
    assert sizing.reserved_gpu_hours == pytest.approx(reserved)
    assert sizing.cost == pytest.approx(2 * reserved)
    lines = dict(sizing.lines())
    # 8.36 / 8 + 3.01 hours; 8.36 + 8 * 3.01 and 8.36 + 3.01 GPU hours.
    assert lines["in all"] == "4.05 h, 32.4 GPU hours reserved, 11.4 used"
    assert lines["cost"] == "64.86 at 2 a reserved GPU hour"


def test_memory_of_each_zero_stage_of_llama_8b_on_8_workers(llama):
    lengths = of_means(1000, 400, 400, 400)
    config = make_config(llama, train={"num_workers": 8})
    memory = plan(config, lengths, gpus="8xH100").worker_memory

    def states(name):
        return sum(memory[name].parts[p] for p in ("weights", "gradients", "optimizer")) * GIB

    # bf16 weights and gradients 2 + 2, fp32 masters and two moments 12; DDP trains fp32 weights.
    assert states("ddp") == pytest.approx((4 + 4 + 8) * PARAMETERS)
    assert states("zero1") == pytest.approx((2 + 2 + 12 / 8) * PARAMETERS)
    assert states("zero2") == pytest.approx((2 + 2 / 8 + 12 / 8) * PARAMETERS)
    assert states("zero3") == pytest.approx(16 / 8 * PARAMETERS)
    # Gradients go to the CPU as they come.
    assert states("zero2_offload") == pytest.approx(2 * PARAMETERS)
    assert states("zero3_offload") == 0
    assert memory["zero3"].parts["gathered"] == pytest.approx(1e9 * 2 / GIB)
    buckets = {name: memory[name].parts["buckets"] * GIB for name in memory}
    # DDP's hold the gradients once more; a bucket of 5e8 elements in bf16, two that overlap, and
    # the largest gradient on its way to the CPU.
    assert buckets["ddp"] == pytest.approx(4 * PARAMETERS)
    assert (buckets["zero1"], buckets["zero2"]) == pytest.approx((2 * 5e8, 2 * 2 * 5e8))
    assert buckets["zero2_offload"] == pytest.approx(2 * 2 * 5e8 + 2 * 128256 * 4096)
    assert buckets["zero3"] == buckets["zero3_offload"] == pytest.approx(2 * 4096**2)
    # A tile, and the head's gradient in fp32 and bf16.
    head = 2 * 4096 * 32768 + (4 + 2) * 128256 * 4096
    assert memory["zero2"].parts["logits"] == pytest.approx(head / GIB)
    # 8 pairs of 1198 rows; a layer keeps 8 h + q, k, v, out + 4 I elements of 2 bytes a row.
    row = 2 * 32 * (8 * 4096 + 2 * 128 * (32 + 8) + 4 * 14336)
    assert memory["zero2"].parts["activations"] == pytest.approx(8 * 1198 * row / GIB)


def test_the_peak_is_in_the_step_where_the_fp32_gradients_outweigh_backward(llama):
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    shape = model_shape(make_config(llama))

    def memory(stage, workers):
        config = make_config(llama, train={"num_workers": workers})
        sizing = plan(config, of_means(10, 4, 4, 4), gpus=f"{workers}xH200", model=shape)
        return sizing.worker_memory[stage]

    for workers in (1, 2, 4):
        _, theirs = estimate_zero2_model_states_mem_needs(PARAMETERS, workers, cpu_offload=False)
        found = memory("zero2", workers)
        assert found.total - found.parts["context"] == pytest.approx(theirs / GIB)


def test_fp32_weights_are_copied_by_stages_1_and_2_alone(llama):
    config = make_config(llama, train={"bf16": False})
    memory = plan(config, of_means(10, 4, 4, 4), gpus="1xH200").worker_memory
    optimizer = {name: memory[name].parts["optimizer"] * GIB / PARAMETERS for name in memory}
    assert optimizer == pytest.approx(
        {"ddp": 8, "zero1": 12, "zero2": 12, "zero3": 8, "zero2_offload": 0, "zero3_offload": 0}
    )
    assert memory["zero2"].parts["step"] == 0


def test_sizes_of_buffers_are_those_of_deepspeed_and_trl():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    from refscale.scoring import devices, logps
    from refscale.training.presets import deepspeed_config

    def zero(stage):
        preset = deepspeed_config(stage, device="cuda", bf16=True)["zero_optimization"]
        return DeepSpeedZeroConfig(**{k: v for k, v in preset.items() if v != "auto"})

    for stage, overlaps in (("zero1", False), ("zero2", True), ("zero2_offload", True)):
        assert zero(stage).reduce_bucket_size == footprint._BUCKET
        assert (zero(stage).contiguous_gradients, zero(stage).overlap_comm) == (True, overlaps)
    assert zero("zero3").max_live_parameters == footprint._LIVE_PARAMETERS
    assert zero("zero3").sub_group_size == footprint._SUB_GROUP
    assert (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE) == (
        footprint._HEAD_ROWS,
        footprint._HEAD_VOCAB,
    )
    assert logps._TILE_CUDA == (footprint._TILE_ROWS, footprint._TILE_VOCAB)
    assert devices._BUDGET_CUDA == footprint._BUDGETS


def test_activations_of_a_layer_are_what_autograd_keeps():
    import torch
    from transformers import LlamaConfig, LlamaModel

    hidden, inner, heads, kv_heads = 256, 896, 8, 2

    def kept(layers):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
        )
        model = LlamaModel(config).bfloat16()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes, alive = {}, []

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=torch.arange(64)[None], use_cache=False)
        return sum(sizes.values()) / 64

    width = 2 * (hidden // heads) * (heads + kv_heads)
    layer = 2 * (8 * hidden + width + 4 * inner)
    # 1 %: the norms' and attention's few floats a token.
    assert (kept(3) - kept(1)) / 2 == pytest.approx(layer, rel=0.01)


def test_a_replica_holds_weights_activations_at_the_budget_and_a_tile_of_logits(llama):
    config = make_config(llama, ray={"replicas": {"min": 1, "max": 8}})
    sizing = plan(config, of_means(10, 4, 4, 4), gpus="4xH100")
    parts = sizing.replica_memory.parts
    assert parts["weights"] == pytest.approx(2 * PARAMETERS / GIB)
    assert sizing.token_budget == 65536
    assert parts["activations"] == pytest.approx(65536 * 2 * (12 * 4096 + 3 * 14336) / GIB)
    # Products in bf16, logits and their log-softmax in fp32.
    assert parts["logits"] == pytest.approx(4096 * 65536 * (2 + 4 + 4) / GIB)
    assert (sizing.gpus_per_replica, sizing.replicas) == (1, 4)


def test_a_model_too_large_for_one_gpu_takes_several_and_waits_for_itself(llama):
    one = plan(make_config(llama), of_means(10, 4, 4, 4), gpus="4xA100-80")
    lengths = of_means(10, 4, 4, 4)
    config = make_config(llama, ray={"gpus_per_replica": 2, "replicas": 2})
    two = plan(config, lengths, gpus="4xA100-80")
    assert two.replicas == 2
    assert two.gpu_hours["scoring"] == pytest.approx(2 * one.gpu_hours["scoring"])
    assert any("in turn" in note for note in two.notes)
    with pytest.raises(ConfigError, match=r"GiB on each of 1 L4, which have 22\.5"):
        plan(make_config(llama, score={"token_budget": 65536}), lengths, gpus="1xL4")


def test_a_replica_of_several_gpus_is_one_that_the_config_has_to_ask_for(llama_70b):
    shape = model_shape(make_config(llama_70b))

    def sized(**ray):
        config = make_config(llama_70b, ray={"replicas": 2, **ray})
        return plan(config, of_means(10, 4, 4, 4), gpus="8xH100", model=shape)

    def notes(sizing):
        return [note for note in sizing.notes if "ray.gpus_per_replica" in note]

    assert sized().gpus_per_replica == 2
    assert notes(sized()) == [
        "a replica takes 2 GPUs and gets 1 where ray.gpus_per_replica is not set; set"
        " ray.gpus_per_replica: 2"
    ]
    assert sized(gpus_per_replica=2).gpus_per_replica == 2
    assert notes(sized(gpus_per_replica=2)) == []
    # 131.4 GiB of weights, 0.7 of activations, 2.5 of logits, 2 of context.
    said = (
        r"^a scoring replica needs 136\.6 GiB on each of 1 H100, which have 79\.1; raise"
        r" ray\.gpus_per_replica, or give larger GPUs$"
    )
    with pytest.raises(ConfigError, match=said):
        sized(gpus_per_replica=1)


@pytest.mark.parametrize(
    ("ray", "said"),
    [
        (
            {"gpus_per_replica": 0},
            "ray.gpus_per_replica is 0: CPUs do scoring and the evaluation, which plan does not"
            " size; to size GPUs, set ray.gpus_per_replica: 1",
        ),
        (
            {"gpus_per_worker": 0},
            "ray.gpus_per_worker is 0: CPUs do training, which plan does not size; to size GPUs,"
            " set ray.gpus_per_worker: 1",
        ),
        (
            {"gpus_per_replica": 4},
            "ray.gpus_per_replica is 4 and --gpus has 2; lower the one or raise the other",
        ),
    ],
    ids=["cpu_replica", "cpu_worker", "too_many"],
)
def test_what_is_not_on_the_gpus_given_is_not_sized_as_if_it_were(llama, ray, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        plan(make_config(llama, ray=ray), of_means(10, 4, 4, 4), gpus="2xH100")


def test_the_share_of_a_gpu_that_is_too_small_is_said(llama):
    said = r"on each of 1 H100, which have 79\.1 for 4 replica\(s\); raise ray\.gpus_per_replica"
    with pytest.raises(ConfigError, match=said):
        plan(make_config(llama, ray={"gpus_per_replica": 0.25}), of_means(10, 4, 4, 4))


@pytest.mark.parametrize(
    ("ray", "scoring", "evaluation", "notes"),
    [
        (
            {},
            1,
            2,
            ["for which a replica takes 2 GPU(s); evaluate with --set ray.gpus_per_replica=2"],
        ),
        (
            {"gpus_per_replica": 1},
            1,
            2,
            ["for which a replica takes 2 GPU(s); evaluate with --set ray.gpus_per_replica=2"],
        ),
        ({"gpus_per_replica": 2}, 2, 2, []),
    ],
    ids=["unset", "one", "two"],
)
def test_the_evaluation_is_sized_with_the_policy_that_it_loads_unquantised(
    llama_70b, ray, scoring, evaluation, notes
):
    lengths = of_means(1000, 400, 300, 300, holdout_fraction=0.1)
    quantised = {"score": {"quantization": "4bit"}, "train": {"peft": {"r": 16}}}
    config = make_config(llama_70b, ray={"replicas": 4, **ray}, **quantised)
    sizing = plan(config, lengths, gpus="8xH100")
    replica = sizing.evaluation_replica
    assert (sizing.gpus_per_replica, replica.gpus) == (scoring, evaluation)
    weights = sizing.model.parameters * 2 / GIB
    assert replica.memory.parts["weights"] == pytest.approx(weights / evaluation)
    # Its GPUs are busy in turn; four replicas run side by side.
    hours = sizing.flops["evaluation"] / (0.45 * 989e12 * 3600)
    assert sizing.gpu_hours["evaluation"] == pytest.approx(hours * evaluation)
    assert sizing.hours["evaluation"] == pytest.approx(hours / 4)
    assert sizing.hours["scoring"] == pytest.approx(
        sizing.flops["scoring"] / (0.45 * 989e12 * 3600) / 4
    )
    found = [note for note in sizing.notes if "ray.gpus_per_replica" in note]
    assert found == [f"the evaluation loads the policy unquantised, {note}" for note in notes]
    line = dict(sizing.lines())["evaluation replica"]
    assert line.startswith(f"{evaluation} GPU(s), ") and line.endswith("; not quantised")
    assert sizing.as_dict()["evaluation_replica"]["memory"]["total"] == replica.memory.total


def test_an_evaluation_that_fits_on_no_gpus_given_is_said(llama_70b):
    quantised = {"score": {"quantization": "4bit"}, "train": {"peft": {"r": 16}}}
    config = make_config(llama_70b, **quantised)
    shape = model_shape(config)
    lengths = of_means(1000, 400, 300, 300, holdout_fraction=0.1)
    sizing = plan(config, lengths, gpus="1xH100", model=shape)
    assert sizing.replica_memory.fits
    [note] = [note for note in sizing.notes if note.startswith("the evaluation does not fit")]
    assert note == (
        "the evaluation does not fit: it loads the policy unquantised, 136.6 GiB on each of"
        " 1 GPU(s), which have 79.1; give more or larger GPUs"
    )
    assert "DOES NOT FIT" in dict(sizing.lines())["evaluation replica"]
    # Nothing held out, and no policy is loaded; nothing quantised, and it is as the reference.
    for other, found in (
        (config, replace(lengths, holdout_pairs=0)),
        (make_config(llama_70b, ray={"gpus_per_replica": 2}), lengths),
    ):
        sizing = plan(other, found, gpus="2xH100", model=shape)
        assert sizing.evaluation_replica is None
        assert not [note for note in sizing.notes if "unquantised" in note]


@pytest.mark.parametrize(
    ("ray", "replicas", "used", "note"),
    [
        ({}, 1, 1, "ray.replicas is 1: 7 of 8 GPUs idle in scoring; set ray.replicas: 8"),
        (
            {"replicas": {"min": 1, "max": 6}},
            6,
            6,
            "ray.replicas.max is 6: 2 of 8 GPUs idle in scoring; set ray.replicas.max: 8",
        ),
        ({"replicas": 8}, 8, 8, None),
        ({"replicas": 9}, 8, 8, "ray.replicas asks for 9, 8 fit(s) on 8 GPUs"),
        ({"replicas": 16, "gpus_per_replica": 0.5}, 16, 8, None),
        (
            {"replicas": 3, "gpus_per_replica": 0.5},
            3,
            2,
            "ray.replicas is 3: 6 of 8 GPUs idle in scoring; set ray.replicas: 16",
        ),
    ],
)
def test_replicas_are_those_that_the_run_starts(llama, ray, replicas, used, note):
    config = make_config(llama, ray=ray, train={"num_workers": 8})
    sizing = plan(config, of_means(10, 4, 4, 4), gpus="8xH200")
    assert sizing.replicas == replicas
    assert sizing.hours["scoring"] == pytest.approx(sizing.gpu_hours["scoring"] / used)
    assert [n for n in sizing.notes if "ray.replicas" in n] == ([note] if note else [])


def test_a_stage_that_does_not_fit_is_a_note_with_what_would(llama):
    shape = model_shape(make_config(llama))
    lengths = of_means(10, 40, 40, 40)

    def notes(gpus, **train):
        sizing = plan(make_config(llama, train=train), lengths, gpus=gpus, model=shape)
        return [note for note in sizing.notes if "does not fit" in note]

    # 20 bytes a parameter on one worker are 150 GiB, 2 + 18 / 2 on each of two 82, 2 + 18 / 4 on
    # each of four 49.
    [note] = notes("1xH100")
    assert (
        note.startswith("zero2 does not fit: 1") and "on each of 1 GPU(s), which have 79.1" in note
    )
    assert note.endswith(
        "; train.num_workers: 4 with as many GPUs or train.deepspeed: zero2_offload"
    )
    assert notes("2xH100", num_workers=2)[0].startswith("zero2 does not fit: 84.3 GiB")
    assert notes("4xH100", num_workers=4) == []
    assert notes("1xH100", deepspeed="zero2_offload") == []
    [note] = notes("1xL4", deepspeed="zero1", gradient_checkpointing=True)
    assert note.startswith("zero1 does not fit") and "zero3_offload" in note
    assert notes("1xL4", deepspeed={"train_batch_size": "auto"}) == []


def test_gradient_checkpointing_is_named_with_its_memory_where_a_stage_does_not_fit(llama):
    shape = model_shape(make_config(llama))
    lengths = of_means(10, 400, 300, 300)

    def note(gpus, **train):
        config = make_config(llama, train={"num_workers": 8, **train})
        sizing = plan(config, lengths, gpus=gpus, model=shape)
        [found] = [note for note in sizing.notes if "does not fit" in note]
        return found

    # 8 pairs of 998 rows: 47.9 GiB of activations, and 3.4 where each layer is computed again.
    found = note("8xH100")
    assert found.startswith("zero2 does not fit: 82.8 GiB on each of 8 GPU(s), which have 79.1; ")
    assert found.endswith(
        "; train.gradient_checkpointing: true (38.5 GiB) or train.num_workers: 16 with as many GPUs"
        " or train.deepspeed: zero3"
    )
    assert note("8xL4").endswith(
        "; a smaller micro-batch; train.gradient_checkpointing: true (38.5 GiB) is not enough alone"
    )
    # It is on already, so it is no way out.
    assert "gradient_checkpointing" not in note("8xL4", gradient_checkpointing=True)


def shipped_configs():
    """The configs for 8 GPUs that the README and the RayJob have."""
    job = (ROOT / "cluster/kuberay/rayjob-gpu.yaml").read_text()
    readme = re.search(r"^    model:\n(?:(?:    .*)?\n)+", (ROOT / "README.md").read_text(), re.M)
    yield "README", yaml.safe_load(readme[0])
    yield "RayJob", yaml.safe_load(next(yaml.safe_load_all(job))["data"]["config.yaml"])


@pytest.mark.parametrize("values", [pytest.param(v, id=name) for name, v in shipped_configs()])
def test_an_8b_model_fits_with_the_configs_that_are_shipped(llama, values):
    config = parse_config({**values, "model": {"model_name_or_path": str(llama)}})
    assert config.train.num_workers == 8
    lengths = of_means(10, 400, 300, 300, max_length=config.encoding.max_length)
    sizing = plan(config, lengths, gpus="8xH100")
    assert sizing.worker_memory[sizing.stage].fits


def test_averages_are_sized_for_a_pair_that_fills_max_length(tmp_path, llama):
    path = tmp_path / "config.yaml"
    config = make_config(llama, encoding={"max_length": 1024}, train={"num_workers": 8})
    path.write_text(yaml.safe_dump(config.model_dump()))
    sizing = size_run(str(path), gpus="8xH100", lengths="400,300,300", num_pairs=1000)
    # 8 pairs, both of whose sides have 1024 rows; the mean pair has 998 and would take half.
    row = 2 * 32 * (8 * 4096 + 2 * 128 * (32 + 8) + 4 * 14336)
    activations = sizing.worker_memory["zero2"].parts["activations"]
    assert activations == pytest.approx(8 * 2048 * row / GIB)
    assert sizing.lengths.origin.endswith("sides fill encoding.max_length, 1,024")
    # All else is that of the average.
    assert sizing.flops["scoring"] == pytest.approx(
        plan(config, of_means(1000, 400, 300, 300), gpus="8xH100").flops["scoring"]
    )


def test_what_gpus_send_each_other_is_said_to_be_not_modelled(llama):
    def said(workers):
        config = make_config(llama, train={"num_workers": workers})
        lines = plan(config, of_means(10, 4, 4, 4), gpus="8xH200").lines()
        return [value for _, value in lines if "is not modelled" in value]

    assert len(said(8)) == 1 and said(1) == []


def test_idle_gpus_in_training_are_a_note(llama):
    shape = model_shape(make_config(llama))
    lengths = of_means(10, 4, 4, 4)
    [note] = [
        n
        for n in plan(make_config(llama), lengths, gpus="8xH100", model=shape).notes
        if "train.num_workers" in n and "idle" in n
    ]
    assert note.startswith("train.num_workers is 1: 7 of 8 GPUs idle in training")


@pytest.mark.parametrize(
    ("packed", "budget", "tokens"),
    [
        ("auto", 2048, 2048),
        ("auto", 500, 1198),  # a pair longer than the budget goes alone
        ("off", 4096, 4096),
        ("off", 500, 2 * 1024),
    ],
)
def test_a_token_budget_bounds_the_activations_of_training(llama, packed, budget, tokens):
    train = {"num_workers": 8, "token_budget": budget, "packed": packed}
    memory = plan(make_config(llama, train=train), of_means(9, 400, 400, 400), gpus="8xH100")
    row = 2 * 32 * (8 * 4096 + 2 * 128 * (32 + 8) + 4 * 14336)
    activations = memory.worker_memory["zero2"].parts["activations"]
    assert activations == pytest.approx(tokens * row / GIB)


def test_measuring_the_holdout_while_training_is_work_of_its_own(llama):
    lengths = of_means(1_000_000, 400, 300, 300, holdout_fraction=0.05)
    shape = model_shape(make_config(llama))

    def sized(train, **sections):
        train = {"num_workers": 8, "per_device_train_batch_size": 8, **train}
        assumed = Assumptions(training_mfu=0.5, price_per_gpu_hour=2.0)
        return plan(
            make_config(llama, train=train, **sections),
            lengths,
            gpus="8xH100",
            assumptions=assumed,
            model=shape,
        )

    without, sizing = sized({}), sized({"eval_steps": 100})
    pair = sizing.flops["scoring"] / 1e6
    # Half of 950,000 pairs in steps of 64 are 7,422 steps: measured after every 100th and the last.
    assert (sizing.measurements, sizing.measured_pairs) == (75, 50_000)
    assert sizing.flops["measuring"] == pytest.approx(75 * 50_000 * pair)  # a forward each
    assert list(sizing.flops) == ["scoring", "training", "measuring", "evaluation"]
    assert sizing.measured_tokens == 75 * 50_000 * 1000
    hours = sizing.flops["measuring"] / (0.5 * 989e12) / 3600
    assert sizing.gpu_hours["measuring"] == pytest.approx(hours)
    assert sizing.hours["measuring"] == pytest.approx(hours / 8)
    assert sizing.cost == pytest.approx(without.cost + 2 * hours)
    line = dict(sizing.lines())["measuring"]
    # 998 tokens, 600 head rows and 409,100 keys are 1.478e13 operations a pair.
    assert line.startswith("5.54e+19 FLOP, 31.1 GPU hours, 3.89 h; 75 times 50,000 held-out pairs")
    # 75 * 50,000 forwards beside 3 * 475,000 passes: 263 %; a fifth are 0.6 * 475,000 / 75.
    [note] = [note for note in sizing.notes if "eval_steps" in note]
    assert "50,000 held-out pairs 75 time(s), 263% of its own operations" in note
    most = int(re.search(r"evaluate\.max_pairs: (\d+),", note)[1])
    assert 3799 <= most <= 3800
    fewer = sized({"eval_steps": 100}, evaluate={"max_pairs": most})
    assert fewer.flops["measuring"] == pytest.approx(75 * most * pair)
    assert not [note for note in fewer.notes if "eval_steps" in note]
    assert without.measurements == 0 and "measuring" not in dict(without.lines())


@pytest.mark.parametrize(
    ("train", "measurements"),
    [
        ({"max_steps": 7, "save_steps": 2, "eval_steps": 2}, 4),  # after 2, 4, 6 and 7
        ({"max_steps": 8, "save_steps": 2, "eval_steps": 2}, 4),
        ({"max_steps": 7, "save_steps": 2, "eval_steps": 2, "trl": {"eval_on_start": True}}, 5),
        ({"max_steps": 7, "save_steps": 2, "eval_steps": 2, "trl": {"eval_delay": 5}}, 2),
        # 45 pairs kept: in twos, each of 2 accumulated, 12 steps an epoch.
        ({"num_train_epochs": 2, "per_device_train_batch_size": 2, "eval_steps": 10,
          "gradient_accumulation_steps": 2}, 3),
        # 4 pairs of 12 tokens fit: 12 steps too.
        ({"token_budget": 50, "eval_steps": 5}, 3),
    ],
)  # fmt: skip
def test_the_holdout_is_measured_every_eval_steps_and_after_the_last(llama, train, measurements):
    lengths = of_means(100, 4, 4, 4, holdout_fraction=0.1)
    assert plan(make_config(llama, train=train), lengths).measurements == measurements


def test_padded_training_takes_longer_unless_its_mfu_is_given(llama):
    lengths = of_means(100, 400, 400, 400, holdout_fraction=0.1)

    def sized(packed, **assumed):
        config = make_config(llama, train={"eval_steps": 100, "packed": packed})
        return plan(config, lengths, assumptions=Assumptions(**assumed))

    packed, padded = sized("auto"), sized("off")
    assert (packed.measured_tokens, padded.measured_tokens) == (10 * 1200, 10 * 1600)
    assert packed.assumptions.training_mfu == 0.35
    assert padded.assumptions.training_mfu == pytest.approx(0.35 * 1200 / 1600)
    given = [sized(packed, training_mfu=0.3) for packed in ("auto", "off")]
    for name in ("training", "measuring"):
        assert padded.flops[name] == packed.flops[name]
        # The prompt is computed twice.
        assert padded.gpu_hours[name] == pytest.approx(packed.gpu_hours[name] * 1600 / 1200)
        # A measured MFU is that of a run that was padded too.
        assert given[0].gpu_hours[name] == given[1].gpu_hours[name]


def test_without_a_holdout_nothing_is_measured(llama):
    sizing = plan(make_config(llama, train={"eval_steps": 100}), of_means(100, 4, 4, 4))
    assert (sizing.measurements, sizing.measured_tokens) == (0, 0)
    assert "measuring" not in sizing.flops and "measuring" not in sizing.hours


def test_a_count_of_each_source_is_kept_of_each_that_is_trained_on(llama):
    sources = [{"path": name} for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    corpus = {"sources": [*sources, {"path": "held.jsonl", "holdout": True}]}
    lengths = of_means(1_000_000, 40, 40, 40)

    def sized(**select):
        return plan(make_config(llama, corpus=corpus, select=select), lengths)

    each = sized(count=100_000, per_source=True)
    # As the selection counts: three groups, of any size that holds so many.
    spec = SelectionSpec(count=100_000, per_source=True)
    totals = {Group("a"): 100_000, Group("b"): 300_000, Group("c"): 600_000}
    ranks = spec.ranks(totals).values()
    assert each.pairs["kept"] == sum(stop - start for start, stop in ranks) == 300_000
    assert any("select.count is 100,000 of each of 3 source(s)" in note for note in each.notes)
    assert sized(count=500_000, per_source=True).pairs["kept"] == 1_000_000
    once = sized(count=100_000)
    assert once.pairs["kept"] == 100_000 and not any("select.count" in n for n in once.notes)


def test_a_token_budget_says_how_many_pairs_max_steps_takes(llama):
    train = {"token_budget": 12_000, "max_steps": 5, "gradient_accumulation_steps": 2}
    sizing = plan(make_config(llama, train=train), of_means(900, 400, 400, 400))
    # 10 pairs of 1200 tokens a micro-batch: 100 pairs, forward and backward.
    assert sizing.flops["training"] == pytest.approx(3 * sizing.flops["scoring"] * 100 / 900)


def test_lora_holds_gradients_and_optimizer_of_the_adapter_only(llama):
    config = make_config(llama, train={"peft": {"r": 16, "target_modules": ["q_proj", "v_proj"]}})
    shape = model_shape(config)
    # r * (in + out) of q: 4096 -> 4096 and v: 4096 -> 1024, in 32 layers.
    assert shape.trainable == 32 * 16 * ((4096 + 4096) + (4096 + 1024))
    memory = plan(config, of_means(10, 4, 4, 4), model=shape).worker_memory["zero2"]
    assert memory.parts["optimizer"] == pytest.approx(12 * shape.trainable / GIB)
    # A tile alone: the head has no gradient.
    assert memory.parts["logits"] == pytest.approx(2 * 4096 * 32768 / GIB)


@pytest.mark.parametrize(("kind", "size"), [("8bit", 1), ("4bit", 0.5 + 4 / 64)])
def test_a_quantised_base_takes_its_bits_in_scoring_and_in_training(llama, kind, size):
    quantised = {"score": {"quantization": kind}, "train": {"peft": {"r": 16}, "num_workers": 8}}
    sizing = plan(make_config(llama, **quantised), of_means(10, 4, 4, 4), gpus="8xH100")
    # Embeddings, head and norms stay in bf16.
    weights = (size * BACKBONE + 2 * (PARAMETERS - BACKBONE)) / GIB
    assert sizing.model.quantizable == BACKBONE
    assert sizing.replica_memory.parts["weights"] == pytest.approx(weights)
    for stage, memory in sizing.worker_memory.items():
        assert memory.parts["weights"] == pytest.approx(weights), stage
    # ZeRO-3 is refused.
    assert list(sizing.worker_memory) == ["ddp", "zero1", "zero2", "zero2_offload"]
    assert sizing.workers_needed.keys() == sizing.worker_memory.keys()
    assert not any("training, zero3" in name for name, _ in sizing.lines())


def test_a_quantised_70b_model_trains_at_zero2_and_is_offered_no_stage_that_is_refused(llama_70b):
    from refscale.training.checks import check_training

    config = make_config(
        llama_70b,
        score={"quantization": "4bit"},
        train={"peft": {"r": 16}, "num_workers": 8, "gradient_checkpointing": True},
    )
    check_training(config)
    shape = model_shape(config)

    def notes(gpus):
        found = plan(config, of_means(10, 400, 300, 300), gpus=gpus, model=shape).notes
        return [note for note in found if "does not fit" in note or "zero3" in note]

    assert notes("8xH100") == []
    # 2 GiB of buckets, 39.8 of weights and 8 pairs of 998 rows.
    [note] = notes("8xL40S")
    assert note.startswith("zero2 does not fit: ") and note.endswith(
        "which have 44.5; a smaller micro-batch"
    )


@pytest.mark.parametrize(
    ("train", "note"),
    [
        ({"peft": {"r": 16}}, None),
        ({"peft": {"r": 16}, "deepspeed": "zero3"}, "4bit and train.deepspeed is ZeRO-3, which"),
        (
            {"peft": {"r": 16}, "deepspeed": {"zero_optimization": {"stage": 3}}},
            "4bit and train.deepspeed is ZeRO-3, which",
        ),
        (
            {"peft": {"r": 16}, "deepspeed": {"zero_optimization": 3}},
            "train.deepspeed.zero_optimization is 3, which must be a mapping",
        ),
        ({}, "4bit but train.peft is not set"),
    ],
    ids=["lora", "preset", "config", "malformed", "full"],
)
def test_what_training_refuses_of_a_quantised_base_is_a_note(llama, train, note):
    config = make_config(llama, score={"quantization": "4bit"}, train=train)
    sizing = plan(config, of_means(10, 4, 4, 4))
    found = [note for note in sizing.notes if note.startswith("training refuses this: ")]
    assert len(found) == (note is not None) and all(note in text for text in found)


@pytest.mark.parametrize(
    ("values", "quantizable"),
    [
        # 12 d^2 a layer in Conv1D; the head is the embedding.
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}, 2 * 12 * 64**2),
        # q and o, k and v; the experts are fused in one tensor each, as is the router.
        (
            {
                "model_type": "mixtral",
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_local_experts": 4,
            },
            2 * (2 * 64**2 + 2 * 64 * 32),
        ),
    ],
    ids=["gpt2", "mixtral"],
)
def test_the_weights_that_are_quantised_are_those_of_plain_linear_layers(
    tmp_path, values, quantizable
):
    (tmp_path / "config.json").write_text(json.dumps({**values, "vocab_size": 256}))
    shape = model_shape(make_config(tmp_path))
    assert shape.quantizable == quantizable < shape.parameters


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_starts_from_the_weights_is_counted_without_them(llama, start):
    one, other = (
        model_shape(make_config(llama, train={"peft": {"r": 16, "init_lora_weights": init}}))
        for init in (True, start)
    )
    assert one == other and one.trainable < one.parameters


@pytest.mark.parametrize(
    ("model", "peft", "said"),
    [
        ({}, {"r": 4, "target_modules": ["query_proj"]}, "Target modules .*query_proj.* not found"),
        ({"model_type": "olmo2"}, {"r": 4}, "Please specify `target_modules`"),
        ({}, {"r": 4, "rank_pattern": {"[": 2}}, "unterminated character set"),
        ({}, {"r": 4, "layer_replication": [[0, 9]]}, "index 1 is out of range"),
    ],
    ids=["unknown", "no_default", "pattern", "layer"],
)
def test_an_adapter_that_the_model_does_not_take_is_an_error_of_the_config(
    tmp_path, model, peft, said
):
    values = {**LLAMA_8B, "num_hidden_layers": 1, **model}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"^train\.peft does not go with {tmp_path}: {said}"):
        model_shape(make_config(tmp_path, train={"peft": peft}))


def test_lora_computes_no_gradients_of_the_frozen_weights(llama):
    lengths = of_means(10, 4, 4, 4)
    peft = {"r": 16, "target_modules": ["q_proj", "v_proj"]}
    full, lora, checkpointed = (
        plan(make_config(llama, train=train), lengths)
        for train in ({}, {"peft": peft}, {"peft": peft, "gradient_checkpointing": True})
    )
    # Forward and both gradients; forward and the inputs' gradients; the forward once more.
    assert lora.flops["training"] == pytest.approx(full.flops["training"] * 2 / 3)
    assert lora.gpu_hours["training"] == pytest.approx(full.gpu_hours["training"] * 2 / 3)
    assert checkpointed.flops["training"] == lora.flops["training"]
    assert checkpointed.gpu_hours["training"] == pytest.approx(full.gpu_hours["training"])


def test_gradient_checkpointing_takes_a_forward_more_and_far_fewer_activations(llama):
    shape = model_shape(make_config(llama))
    lengths = of_means(1000, 400, 400, 400)
    lengths = replace(lengths, holdout_pairs=100)

    def sized(checkpointing, **assumed):
        train = {"gradient_checkpointing": checkpointing, "eval_steps": 10}
        assumptions = Assumptions(**assumed)
        return plan(make_config(llama, train=train), lengths, model=shape, assumptions=assumptions)

    plain, checkpointed = sized(False), sized(True)
    assert checkpointed.flops == plain.flops  # useful ones
    hours, longer = plain.gpu_hours, checkpointed.gpu_hours
    assert longer["training"] == pytest.approx(hours["training"] * 4 / 3)
    assert longer["measuring"] == pytest.approx(hours["measuring"])  # a forward alone
    # A measured MFU has the recomputation in it: 0.3 of useful operations, of 0.4 computed.
    given = sized(True, training_mfu=0.3)
    flops = plain.flops
    assert given.gpu_hours["training"] == pytest.approx(flops["training"] / (0.3 * 989e12 * 3600))
    assert given.gpu_hours["measuring"] == pytest.approx(flops["measuring"] / (0.4 * 989e12 * 3600))
    before, after = (s.worker_memory["zero2"].parts["activations"] for s in (plain, checkpointed))
    assert after < before / 10


@pytest.mark.parametrize(
    ("dtype", "bf16", "scoring", "training", "notes"),
    [
        ("bfloat16", None, 989, 989, []),
        ("auto", None, 989, 989, []),
        ("float32", None, 67, 67, ["scoring in model.dtype float32", "training in float32"]),
        ("float32", True, 67, 989, ["scoring in model.dtype float32"]),
        ("bfloat16", False, 989, 67, ["training in float32"]),
        ("float16", None, 989, 67, ["training in float32"]),  # train.bf16 is what scored in bf16
    ],
)
def test_scoring_and_training_are_each_sized_in_their_own_dtype(
    llama, dtype, bf16, scoring, training, notes
):
    config = make_config(llama, train={"bf16": bf16, "eval_steps": 10})
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    lengths = of_means(1000, 400, 400, 400, holdout_fraction=0.1)
    sizing = plan(config, lengths, gpus="4xH200")
    for name, mfu, tflops in (
        ("scoring", 0.45, scoring),
        ("evaluation", 0.45, scoring),
        ("training", 0.35, training),
        ("measuring", 0.35, training),
    ):
        hours = sizing.flops[name] / (mfu * tflops * 1e12 * 3600)
        assert sizing.gpu_hours[name] == pytest.approx(hours), name
    # Weights of a replica, and weights with DeepSpeed: 2 bytes or 4.
    size = 2 if scoring == 989 else 4
    assert sizing.replica_memory.parts["weights"] == pytest.approx(size * PARAMETERS / GIB)
    size = 2 if training == 989 else 4
    assert sizing.worker_memory["zero2"].parts["weights"] == pytest.approx(size * PARAMETERS / GIB)
    peaks = [note for note in sizing.notes if "without TF32" in note]
    assert peaks == [f"{note}: the peak is that of fp32 without TF32" for note in notes]


def test_the_operations_of_a_micro_batch_are_those_that_a_run_counts(tiny_model):
    """So that a run's model_flops_per_s over the peak is what --training-mfu takes."""
    import torch
    from transformers import AutoModelForCausalLM

    from refscale.training.dpo_trainer import training_flops, useful_work
    from refscale.training.packed_dpo import PackedCollator

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    sides = (list(range(10, 50)), list(range(60, 80)), list(range(90, 105)))
    batch = PackedCollator(pad_token_id=0)([dict(zip(names, sides, strict=True))] * 3)
    batch["ref_chosen_logps"] = torch.zeros(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    counted = training_flops(model).total(*useful_work(batch).tolist())
    lengths = of_means(3, 40, 20, 15)
    config = make_config(tiny_model, select={"fraction": 1.0}, train={"deepspeed": None})
    planned = plan(config, lengths, gpus="1xH100").flops["training"]
    # A run counts the last token of each completion too, 2 of 75, which has no prediction.
    assert 1 < counted / planned < 75 / 73


def test_operations_are_those_that_the_engine_counts(tiny_model):
    from refscale.scoring.reference import EncodedPairs, ReferenceModel

    rng = np.random.default_rng(0)

    def ids(count):
        return rng.integers(0, 250, count).astype(np.int32)

    prompts = [ids(n) for n in (5, 17, 17, 40)]
    prompts[2] = prompts[1]  # a prompt with four completions
    chosen, rejected = [ids(n) for n in (3, 9, 1, 30)], [ids(n) for n in (8, 2, 12, 31)]
    model = ReferenceModel.load(str(tiny_model), dtype="float32", device="cpu", path="packed")
    stats = model.score(EncodedPairs(prompts, chosen, rejected)).stats
    lengths = of_pairs(prompts, chosen, rejected, origin="test")
    sizing = plan(make_config(tiny_model), lengths)
    assert sizing.flops["scoring"] == pytest.approx(stats.flops, rel=1e-12)
    assert lengths.useful_tokens == stats.useful_tokens


def test_averages_are_the_limit_of_pairs_that_share_nothing():
    rng = np.random.default_rng(1)
    pairs = [(rng.permutation(200)[:30]).astype(np.int32).reshape(3, 10) for _ in range(5)]
    counted = of_pairs(*([p[side] for p in pairs] for side in range(3)), origin="test")
    given = of_means(5, 10, 10, 10)
    for name in ("useful_tokens", "scoring", "alone", "padded_tokens"):
        assert getattr(given, name) == getattr(counted, name), name
    twice = counted.scaled_to(10, 1)
    assert (twice.num_pairs, twice.holdout_pairs) == (10, 1)
    assert twice.scoring.context == 2 * counted.scoring.context


def test_training_is_not_taken_to_share_a_system_prompt_as_scoring_does(tiny_model):
    rng = np.random.default_rng(1)
    system = rng.integers(0, 250, 100).astype(np.int32)
    prompts = [np.concatenate([system, np.int32([i])]) for i in range(40)]
    sides = [[rng.integers(0, 250, 10).astype(np.int32) for _ in prompts] for _ in range(2)]
    lengths = of_pairs(prompts, *sides, origin="test")
    assert lengths.scoring.rows == 100 + 40 * (1 + 9 + 9)
    assert lengths.alone.rows == 40 * (100 + 1 + 9 + 9)
    found, given = (
        plan(make_config(tiny_model), x).flops for x in (lengths, of_means(40, 101, 10, 10))
    )
    assert found["training"] == given["training"]
    assert found["scoring"] < given["scoring"] / 4


def test_training_counts_a_prompt_of_several_pairs_for_each(llama):
    prompt = np.arange(81, dtype=np.int32)
    answers = [np.arange(55, dtype=np.int32) + 100 * i for i in range(1, 5)]
    chosen, rejected = zip(
        *((answers[i], answers[j]) for i in range(4) for j in range(i)), strict=True
    )
    lengths = of_pairs([prompt] * 6, chosen, rejected, origin="test")
    alike = of_means(6, 81, 55, 55)
    assert lengths.useful_tokens < alike.useful_tokens / 3
    train = {"token_budget": 2 * (81 + 54 + 54), "max_steps": 5}
    for packed in ("auto", "off"):
        config = make_config(llama, train={**train, "packed": packed})
        found, given = (plan(config, x, gpus="8xH100") for x in (lengths, alike))
        assert found.gpu_hours["training"] == pytest.approx(given.gpu_hours["training"])
        assert found.flops["training"] == given.flops["training"]


def test_every_assumption_is_printed_with_its_value(llama):
    shape = model_shape(make_config(llama))
    lengths = of_means(10, 4, 4, 4)
    assumed = Assumptions(0.41, 0.31, 3.5, 1.75)
    lines = dict(plan(make_config(llama), lengths, model=shape, assumptions=assumed).lines())
    shown = {name: value for name, value in lines.items() if name.startswith("assumed")}
    assert shown == {
        "assumed: scoring_mfu": "0.41",
        "assumed: training_mfu": "0.31",
        "assumed: context_gib": "3.5",
        "assumed: price_per_gpu_hour": "1.75",
    }
    free = plan(make_config(llama), lengths, model=shape)
    assert free.cost is None and not any("cost" in name for name, _ in free.lines())
    json.dumps(free.as_dict(), allow_nan=False)


def test_malformed_arguments_say_what_is_right(tmp_path):
    assert parse_gpus("8xh100")[0] == 8 and parse_gpus("L4")[1].name == "L4"
    for text in ("8xH999", "0xH100", "x", "manyxH100"):
        with pytest.raises(ConfigError, match="NUMBERxGPU with one of H100, H200"):
            parse_gpus(text)
    assert read_means("400,300.5,1") == (400, 300.5, 1)
    with pytest.raises(ConfigError, match="PROMPT,CHOSEN,REJECTED"):
        read_means("400,300")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot read the config"):
        model_shape(make_config(tmp_path / "empty"))


def test_a_model_that_is_not_there_is_said_to_be_a_missing_folder_or_a_hub_id(tmp_path):
    from refscale.scoring.reference import ReferenceModel

    def load(name):
        ReferenceModel.load(str(name), dtype="float32", device="cpu")

    for look in (load, lambda name: model_shape(make_config(name))):
        with pytest.raises(ModelError) as caught:
            look(tmp_path / "absent")
        said = f"model.model_name_or_path: folder {tmp_path / 'absent'} does not exist"
        assert str(caught.value) == said
        with pytest.raises(ModelError, match="no folder path/to/ckpt beside the config, so it was"):
            look("path/to/ckpt")


@pytest.mark.parametrize("pairs", [0, -5])
def test_a_number_of_pairs_is_positive(tmp_path, llama, pairs):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(llama).model_dump()))
    with pytest.raises(ConfigError, match=f"--pairs must be a positive integer, got {pairs}"):
        size_run(str(path), lengths="400,300,300", num_pairs=pairs)


def test_a_source_that_is_held_out_is_not_trained_on(tmp_path, tiny_model):
    write_jsonl(tmp_path / "train.jsonl", string_pairs(40))
    write_jsonl(tmp_path / "held.jsonl", string_pairs(24, seed=1))
    write_jsonl(tmp_path / "kept.jsonl", string_pairs(16, seed=2))
    sources = [
        {"path": str(tmp_path / "train.jsonl")},
        {"path": str(tmp_path / "held.jsonl"), "holdout": True},
        {"path": str(tmp_path / "kept.jsonl"), "holdout": False},
    ]
    config = make_config(
        tiny_model,
        corpus={"sources": sources, "holdout_fraction": 0.1},
        select={"fraction": 0.5},
    )
    # A sample that the first source would fill alone still sees the others.
    lengths = of_sources(config, sample=30)
    # All 24 of one source, a tenth of the 40 of another, none of the third.
    assert (lengths.num_pairs, lengths.holdout_pairs) == (80, 28)
    assert plan(config, lengths).pairs == {"scored": 80, "kept": 26, "holdout": 28}
    more = of_sources(config, num_pairs=8000)
    assert (more.num_pairs, more.holdout_pairs) == (8000, 2800)
    assert more.origin.startswith("80 pairs of 3 of 3 units")


def test_lengths_of_sources_are_those_of_the_pairs_that_prepare_makes(tmp_path, tiny_model):
    write_jsonl(tmp_path / "pairs.jsonl", string_pairs(40))
    config = make_config(
        tiny_model,
        corpus={"sources": [{"path": str(tmp_path / "pairs.jsonl")}], "holdout_fraction": 0.1},
    )
    lengths = of_sources(config)
    assert (lengths.num_pairs, lengths.holdout_pairs) == (40, 4)
    # Byte tokens: every character, and an EOS for each side.
    rows = string_pairs(40)
    texts = sum(len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) + 2 for row in rows)
    assert lengths.useful_tokens == texts
    assert of_sources(config, num_pairs=4000).useful_tokens == pytest.approx(100 * texts)


def test_lengths_of_a_run_are_its_first_shards_scaled_to_all(tmp_path):
    store = Store(tmp_path)
    corpus = StageFolder(store, "corpus")
    corpus.begin({})
    records = []
    for shard, pairs in enumerate((3, 5)):
        ids = [list(range(i, i + 10)) for i in range(pairs)]
        table = pa.table(
            {
                "pair_id": pa.array([bytes([shard, i] * 8) for i in range(pairs)], pa.binary(16)),
                "source": ["s"] * pairs,
                "split": ["train"] * pairs,
                "prompt_ids": pa.array(ids, pa.list_(pa.int32())),
                "chosen_ids": pa.array([[200 + i] * 4 for i in range(pairs)], pa.list_(pa.int32())),
                "rejected_ids": pa.array([[100] * 2] * pairs, pa.list_(pa.int32())),
                "chosen_truncated": [False] * pairs,
                "rejected_truncated": [False] * pairs,
            }
        )
        records.append(corpus.commit_shard(f"shard-{shard:05d}", table, counts={"holdout": shard}))
    corpus.finish({}, records, counts={}, seconds=1.0)
    sampled = of_run(store, sample=1)
    assert (sampled.num_pairs, sampled.holdout_pairs) == (8, 1)
    assert sampled.useful_tokens == pytest.approx(8 * (10 + 4 + 2))
    assert sampled.origin.startswith("1 of 2 shards")
    assert of_run(store).origin.startswith("2 of 2 shards")
