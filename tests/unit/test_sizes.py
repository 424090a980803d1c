"""Sizes of layers that differ, are lists, or are in the configs of a model's parts alone."""

import pytest
import torch
import transformers
from scoring_support import PACKED, VOCAB, build

from refscale.config_file import parse_config
from refscale.scoring.devices import default_budget
from refscale.scoring.flops import Flops
from refscale.scoring.sizes import layer_sizes, widest
from refscale.sizing.footprint import model_shape

PART = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def blt():
    parts = dict.fromkeys(("patcher_config", "encoder_config", "decoder_config"), PART)
    return transformers.BltConfig(
        vocab_size=VOCAB, **parts, global_config={**PART, "hidden_size": 64}
    )


def text_config(name):
    kind, values = PACKED[name]
    return getattr(transformers, f"{kind}TextConfig")(**values)


def test_sizes_are_those_of_each_layer():
    gemma4 = layer_sizes(text_config("gemma4"))
    assert [(s.heads, s.kv_heads, s.head_dim) for s in gemma4] == [(4, 2, 8), (4, 2, 16)] * 2
    mixture = layer_sizes(text_config("gemma4-moe"))
    assert [(s.kv_heads, s.experts, s.experts_used) for s in mixture] == [(2, 4, 2), (1, 4, 2)]
    assert [s.intermediate for s in layer_sizes(text_config("gemma3n"))] == [48, 48, 64, 64]
    assert [s.hidden for s in layer_sizes(blt())] == [32] * 6 + [64] * 2
    dots3 = layer_sizes(transformers.Dots3NoteConfig().get_text_config())
    assert {s.heads for s in dots3} == {64, 128}
    nothing = layer_sizes(transformers.PretrainedConfig())
    assert [(s.hidden, s.heads, s.attention_width) for s in nothing] == [(0, 0, 0)]


@pytest.mark.parametrize(
    ("name", "share", "heads"),
    # Heads of 8 and 16 elements, in as many layers of each kind.
    [("gemma4", 1, 2 * (4 * 8 + 4 * 16)), ("gemma4-moe", 0.5, 4 * 8 + 4 * 16)],
)
def test_flops_count_layers_that_differ_and_no_table(name, share, heads):
    model = build(*PACKED[name])
    weights = sum(
        p.numel() * (share if ".experts." in n else 1)
        for n, p in model.named_parameters()
        if p.dim() > 1 and "embed_tokens" not in n
    )
    assert Flops.of(model) == Flops(2 * weights, 2 * VOCAB * 32, 4 * heads)


def test_flops_of_a_model_in_parts_are_estimated():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(blt())
    flops = Flops.of(model)
    # Heads of 8 in 6 layers of 32, of 16 in 2 layers of 64.
    assert flops.per_context == 4 * 4 * (6 * 8 + 2 * 16)
    assert flops.per_token > 0 and flops.per_head_row > 0


def test_the_budget_of_a_gpu_takes_the_widest_layer(monkeypatch):
    config = text_config("gemma3n")
    assert widest(config) == (32, 64)
    free = 2**23
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    # 12 * 32 + 3 * 64 elements of 2 bytes a token, half of 8 MiB.
    assert default_budget(config, torch.bfloat16, torch.device("cuda")) == 3640


@pytest.mark.parametrize(
    ("name", "intermediate", "width"),
    # Queries and output of 4 heads, keys and values of 2: of 16 elements, and of 8.
    [("gemma4", 48, 2 * 16 * (4 + 2)), ("gemma3n", 64, 2 * 8 * (4 + 2))],
)
def test_a_plan_reads_models_whose_layers_differ(tmp_path, name, intermediate, width):
    text_config(name).save_pretrained(tmp_path)
    config = parse_config(
        {
            "model": {"model_name_or_path": str(tmp_path)},
            "corpus": {"sources": [{"path": "unused.jsonl"}]},
        }
    )
    shape = model_shape(config)
    assert (shape.hidden_size, shape.num_layers) == (32, 4)
    assert (shape.intermediate_size, shape.attention_width) == (intermediate, width)
