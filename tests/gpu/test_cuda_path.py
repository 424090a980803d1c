"""The CUDA path on a CUDA device: varlen attention, half precision, memory. Needs one GPU."""

import numpy as np
import pytest
import torch
from scoring_support import (
    ATTENTION_CASES,
    PACKED,
    build,
    dense,
    make_pairs,
    make_segments,
    own_sums,
    tensors,
)

from refscale.scoring import attention, logps
from refscale.scoring.attention import Layout, layout, packed_attention
from refscale.scoring.forward import Forward
from refscale.scoring.logps import Head, token_logps
from refscale.scoring.packing import plan_packs
from refscale.scoring.reference import EncodedPairs, ReferenceModel
from refscale.scoring.results import ScoringStats, Sums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 CUDA device, found 0"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)], ids=str)
def test_each_row_attends_to_its_own_sequence_alone(case, heads, dtype):
    segments = make_segments(trees=6)
    size = 64
    query, key, value = (
        x.cuda()
        for x in tensors(segments, heads=heads[0], kv_heads=heads[1], size=size, dtype=dtype)
    )
    with layout(Layout(segments)):
        found, _ = packed_attention(
            None,
            query,
            key,
            value,
            None,
            scaling=case.get("scale"),
            sliding_window=case.get("window"),
            softcap=case.get("softcap"),
        )
    wanted = dense(
        query.cpu(),
        key.cpu(),
        value.cpu(),
        segments,
        scale=case.get("scale", size**-0.5),
        window=case.get("window"),
        softcap=case.get("softcap"),
    )
    # One rounding of values up to about 3, and of the probabilities before.
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=tolerance)


def test_half_precision_takes_one_varlen_call(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return attention_call(*args, **options)

    attention_call = attention.varlen_attn
    monkeypatch.setattr(attention, "varlen_attn", counted)
    segments = make_segments(trees=6)
    query, key, value = (x.cuda().bfloat16() for x in tensors(segments, size=64))
    with layout(Layout(segments)):
        packed_attention(None, query, key, value, None)
    assert len(calls) == 1


@pytest.mark.parametrize("compilation", ["off", "on"])
@pytest.mark.parametrize("name", PACKED)
def test_half_precision_is_no_further_from_the_truth_than_the_models_own_forward(name, compilation):
    torch.compiler.reset()
    kind, config = PACKED[name]
    half = build(kind, config).to("cuda", torch.bfloat16)
    double = build(kind, config).double()
    if name in ("mixtral", "qwen3-moe", "gemma4-moe"):
        double.set_experts_implementation("eager")  # the grouped products have no float64
    double.load_state_dict({k: v.cpu().double() for k, v in half.state_dict().items()})
    pairs = make_pairs(prompts=(9,) * 30 + (40,) * 10)
    sides = (pairs.chosen_ids, pairs.rejected_ids)
    truth = np.concatenate([own_sums(double, pairs.prompt_ids, s) for s in sides])
    usual = np.concatenate([own_sums(half, pairs.prompt_ids, s) for s in sides]) - truth
    reference = ReferenceModel.from_model(half, compilation=compilation)
    assert reference.self_check(pairs).path == "packed"
    scores = reference.score(pairs)
    assert reference.info.get("compiled") == {"off": None, "on": "yes"}[compilation]
    error = np.concatenate([scores.chosen_logps, scores.rejected_logps]) - truth
    assert np.sqrt(np.mean(error**2)) <= 1.2 * np.sqrt(np.mean(usual**2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"multiplier": 0.5, "softcap": 3.0}], ids=str)
def test_log_probs_take_one_pass_over_each_tile(monkeypatch, options, dtype):
    monkeypatch.setattr(logps, "_TILE_CUDA", (64, 5000))  # odd numbers of both
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    hidden = normal(150, 64)
    head = Head(normal(12_007, 64), None, options.get("multiplier", 1.0), options.get("softcap"))
    targets = torch.randint(0, 12_007, (150,), device="cuda", generator=generator)
    assert logps._fused_log_sum_exp(hidden.device, dtype) is not None
    fused = token_logps(hidden, targets, head, sum_squares=True)
    monkeypatch.setattr(logps, "_fused_log_sum_exp", lambda device, dtype: None)
    steps = token_logps(hidden, targets, head, sum_squares=True)
    torch.testing.assert_close(fused, steps, rtol=1e-5, atol=1e-4)


def test_launching_a_pack_does_not_wait_for_the_device():
    half = build(*PACKED["llama"]).to("cuda", torch.bfloat16)
    pairs = make_pairs()
    plan = plan_packs(pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids, 4096)
    model, sums = Forward(half), Sums(plan.num_sequences)
    with torch.inference_mode(), model.attending("packed"):
        model.score(plan.packs[0], sums, ScoringStats())  # loads kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.score(plan.packs[0], sums, ScoringStats())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(sums.logps()).all()


@pytest.mark.parametrize("sizes", [(192, 128), (80, 80), (100, 100)], ids=str)
def test_heads_of_any_size_up_to_the_kernels_take_one_call(sizes):
    segments = make_segments(trees=6)
    inputs = [x.cuda().bfloat16() for x in tensors(segments, size=sizes[0], value_size=sizes[1])]
    assert attention._no_varlen(inputs[0], inputs[2], None) is None
    with layout(Layout(segments)):
        found, _ = packed_attention(None, *inputs, None)
    wanted = dense(*(x.cpu() for x in inputs), segments, scale=sizes[0] ** -0.5)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=3e-2)


def test_scores_do_not_depend_on_neighbours_order_or_budget():
    half = build(*PACKED["llama"]).to("cuda", torch.bfloat16)
    pairs = make_pairs(5, prompts=(1, 3, 14, 9, 9, 21, 60, 33))
    wanted = ReferenceModel.from_model(half, token_budget=8192).score(pairs).chosen_logps
    order = np.random.default_rng(0).permutation(len(pairs))
    for budget in (1, 50, 200):
        reference = ReferenceModel.from_model(half, token_budget=budget)
        found = reference.score(pairs.take(order.tolist())).chosen_logps
        # The products' tiles depend on the pack's size: a few roundings of single tokens.
        np.testing.assert_allclose(found, wanted[order], rtol=0.01, atol=0.3)


def test_memory_does_not_grow_with_the_corpus():
    half = build(*PACKED["llama"]).to("cuda", torch.bfloat16)
    reference = ReferenceModel.from_model(half, token_budget=2048)
    rng = np.random.default_rng(0)

    def peak(count):
        prompts = [rng.integers(0, 101, 100).astype(np.int32) for _ in range(count)]
        sides = [[rng.integers(0, 101, 50).astype(np.int32) for _ in prompts] for _ in "cr"]
        return reference.score(EncodedPairs(prompts, *sides)).stats.peak_memory_bytes

    few = peak(50)
    assert peak(1000) <= few * 1.1


def test_a_real_out_of_memory_halves_the_budget():
    half = build(*PACKED["llama"]).to("cuda", torch.bfloat16)
    pairs = make_pairs(6, prompts=(30,) * 2000)
    wanted = ReferenceModel.from_model(half, token_budget=4096).score(pairs).chosen_logps
    torch.cuda.empty_cache()
    reference = ReferenceModel.from_model(half, token_budget=1 << 20)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**25) / total)
    try:
        scores = reference.score(pairs)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert scores.stats.oom_retries >= 1
    assert reference.token_budget < 1 << 20
    assert scores.reason == [None] * len(pairs)
    np.testing.assert_allclose(scores.chosen_logps, wanted, rtol=0.01, atol=0.3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
def test_a_model_on_another_device_than_the_current_one_is_scored_there():
    pairs = make_pairs()
    scores = [
        ReferenceModel.from_model(
            build(*PACKED["llama"]).to(f"cuda:{index}", torch.bfloat16)
        ).score(pairs)
        for index in (0, 1)
    ]
    np.testing.assert_allclose(scores[1].chosen_logps, scores[0].chosen_logps, atol=1e-3)
