"""Each model family on the packed and the padded path against its own logits, in fp32."""

from functools import partial

import numpy as np
import pytest
import torch
from scoring_support import PACKED, PADDED, build, family, make_pairs, own_sums

from refscale.errors import ModelError
from refscale.scoring import attention
from refscale.scoring.reference import ReferenceModel


def check(reference, pairs, tolerance=1e-3):
    chosen = own_sums(reference.model, pairs.prompt_ids, pairs.chosen_ids)
    rejected = own_sums(reference.model, pairs.prompt_ids, pairs.rejected_ids)
    scores = reference.score(pairs)
    assert scores.reason == [None] * len(pairs)
    np.testing.assert_allclose(scores.chosen_logps, chosen, rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores.rejected_logps, rejected, rtol=0, atol=tolerance)
    # Far from what a model without context would say.
    assert np.std(chosen / [len(c) for c in pairs.chosen_ids]) > 0.05


@pytest.mark.parametrize("name", PACKED)
def test_both_paths_give_the_models_own_log_probs(name):
    model = build(*PACKED[name])
    pairs = make_pairs()
    packed = ReferenceModel.from_model(model, token_budget=64)
    assert packed.path == "packed", packed.info
    settled = packed.self_check(pairs)
    assert settled.path == "packed" and settled.largest_error["packed"] < 1e-3
    check(packed, pairs)
    before = model.config._attn_implementation
    check(ReferenceModel.from_model(model, path="padded", token_budget=64), pairs)
    assert model.config._attn_implementation == before != attention.PACKED


@pytest.mark.parametrize("name", PADDED)
def test_models_that_packs_do_not_serve_fall_back_and_are_right(name):
    model = build(*PADDED[name])
    pairs = make_pairs()
    reference = ReferenceModel.from_model(model, token_budget=64)
    settled = reference.self_check(pairs)
    assert settled.path == reference.path == "padded"
    assert settled.largest_error["padded"] < 1e-3
    assert reference.info["path"] == "padded"
    assert "the model's own logits" not in settled.reason  # of every row, in full
    check(reference, pairs)


def test_why_a_model_is_not_packed_is_said():
    reference = ReferenceModel.from_model(build(*PADDED["gpt-oss"]))
    reference.self_check(make_pairs())
    assert "asks for s_aux, which packs do not serve" in reference.info["path_reason"]


def test_a_model_that_sees_what_follows_is_refused():
    # Without is_decoder a BERT looks both ways: padding changes what comes before it.
    kind = family("Bert", pad_token_id=0)
    with pytest.raises(ModelError, match="may not be a causal language model"):
        ReferenceModel.from_model(build(*kind)).self_check(make_pairs())


@pytest.mark.parametrize("name", ["mistral-window", "gemma2"])
def test_the_families_windows_and_caps_matter_here(name):
    # Else the parity above would prove nothing about them.
    kind, config = PACKED[name]
    without = {**config, "sliding_window": 128, "attn_logit_softcapping": None}
    pairs = make_pairs()
    sums = [own_sums(build(kind, c), pairs.prompt_ids, pairs.chosen_ids) for c in (config, without)]
    assert np.abs(sums[0] - sums[1]).max() > 0.1


@pytest.mark.parametrize("name", PACKED)
def test_compiled_layers_give_the_same_log_probs(monkeypatch, name):
    # Captured as on a GPU, without the code generator, which takes a minute a model.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = build(*PACKED[name])
    pairs = make_pairs()
    reference = ReferenceModel.from_model(model, token_budget=64, compilation="on")
    check(reference, pairs)
    assert reference.info["compiled"] == "yes"
    # One whole graph for all layers of a kind: some have two, with and without a window, and twice
    # as many where later layers take over the keys of earlier ones.
    counters = torch._dynamo.utils.counters
    kinds = 4 if getattr(model.config, "num_kv_shared_layers", 0) else 2
    assert not counters["graph_break"] and 1 <= counters["stats"]["unique_graphs"] <= kinds
    assert not any("forward" in vars(module) for module in model.modules()), "left compiled"
