"""Packed attention against dense attention of each row over the keys that it may see."""

import threading

import pytest
import torch
import torch.nn.functional as F
from scoring_support import ATTENTION_CASES, dense, make_segments, tensors, visible

from refscale.scoring import attention
from refscale.scoring.attention import Layout, layout, packed_attention


def varlen_by_segment(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, **more):
    """What torch's varlen attention computes, a segment at a time: causal from the lower right."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert more.pop("enable_gqa") == (query.shape[1] != key.shape[1]) and not more
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
    left, right = window_size
    assert right == 0
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    output = torch.empty_like(query)
    for i in range(len(cu_q) - 1):
        rows, seen = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        q, k, v = (x.transpose(0, 1) for x in (query[rows], key[seen], value[seen]))
        n, m = q.shape[1], k.shape[1]
        assert n <= max_q and m <= max_k
        last = torch.arange(n)[:, None] + m - n  # the key that lines up with each query
        position = torch.arange(m)
        mask = position <= last
        if left >= 0:
            mask &= position >= last - left
        output[rows] = F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(0, 1)
    return output


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_each_row_attends_to_its_own_sequence_alone(case, heads):
    segments = make_segments()
    query, key, value = tensors(segments, heads=heads[0], kv_heads=heads[1])
    scale = case.get("scale", query.shape[-1] ** -0.5)
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
        query,
        key,
        value,
        segments,
        scale=scale,
        window=case.get("window"),
        softcap=case.get("softcap"),
    )
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if "softcap" not in c], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cuda_path_hands_varlen_attention_the_right_keys(monkeypatch, case, heads, seed):
    segments = make_segments(seed)
    query, key, value = tensors(segments, heads=heads[0], kv_heads=heads[1])
    scale = case.get("scale", query.shape[-1] ** -0.5)
    monkeypatch.setattr(attention, "_no_varlen", lambda *tensors: None)
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_segment)
    with layout(Layout(segments)):
        found, _ = packed_attention(
            None, query, key, value, None, scaling=scale, sliding_window=case.get("window")
        )
    wanted = dense(query, key, value, segments, scale=scale, window=case.get("window"))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sizes", [(24, 16), (8, 12), (10, 10)], ids=str)
def test_heads_of_other_sizes_are_padded_to_what_varlen_attention_takes(monkeypatch, sizes):
    segments = make_segments()
    query, key, value = tensors(segments, size=sizes[0], value_size=sizes[1])
    monkeypatch.setattr(attention, "_no_varlen", lambda *tensors: None)
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_segment)
    with layout(Layout(segments)):
        found, _ = packed_attention(None, query, key, value, None)
    wanted = dense(query, key, value, segments, scale=sizes[0] ** -0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


def test_autocast_reaches_the_kernel_as_it_does_sdpa(monkeypatch):
    # Under it, layers with float32 weights rotate queries and keys back to float32.
    segments = make_segments()
    query, key, value = tensors(segments)
    seen, half = [], []

    def varlen(query, key, value, *args, **kwargs):
        seen.append({query.dtype, key.dtype, value.dtype})
        return varlen_by_segment(query, key, value, *args, **kwargs)

    with layout(Layout(segments)), torch.autocast("cpu", torch.bfloat16):
        batches, _ = packed_attention(None, query, key, value.bfloat16(), None)
        monkeypatch.setattr(attention, "_no_varlen", lambda query, *_: half.append(query.dtype))
        monkeypatch.setattr(attention, "varlen_attn", varlen)
        found, _ = packed_attention(None, query, key, value.bfloat16(), None)
    assert seen == [{torch.bfloat16}] and half == [torch.bfloat16]
    assert found.dtype == batches.dtype == torch.bfloat16
    truth = dense(query, key, value, segments, scale=query.shape[-1] ** -0.5)
    # Rounded to 8 bits of mantissa: 2^-9 of values up to about 3, on the way in and out.
    for output in (found, batches):
        torch.testing.assert_close(output.double(), truth, rtol=0, atol=3e-2)


class Tensor:
    is_cuda, device = True, torch.device("cuda")

    def __init__(self, size=128, dtype=torch.bfloat16):
        self.shape, self.dtype = (1, 4, 9, size), dtype


@pytest.mark.parametrize(
    ("query", "value", "softcap", "reason"),
    [
        (Tensor(), Tensor(), None, None),
        (Tensor(192), Tensor(128), None, None),  # DeepSeek-V3
        (Tensor(), Tensor(), 50.0, "no soft-capped scores"),  # Gemma 2
        (Tensor(512), Tensor(512), None, "512 entries"),  # Gemma 4
        (Tensor(dtype=torch.float32), Tensor(), None, "no float32"),
        (torch.zeros(1, 4, 9, 128), torch.zeros(1, 4, 9, 128), None, "not on CUDA"),
    ],
)
def test_what_varlen_attention_does_not_take_is_named(monkeypatch, query, value, softcap, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = attention._no_varlen(query, value, softcap)
    assert found is None if reason is None else reason in found


def test_old_gpus_take_the_batches(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 8.0" in attention._no_varlen(Tensor(), Tensor(), None)


def test_values_may_be_wider_than_keys():
    segments = make_segments()
    query, key, value = tensors(segments, value_size=12)
    with layout(Layout(segments)):
        found, _ = packed_attention(None, query, key, value, None)
    wanted = dense(query, key, value, segments, scale=8**-0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


def test_gradients_are_those_of_the_dense_computation():
    segments = make_segments()
    inputs = [x.double().requires_grad_() for x in tensors(segments)]
    weights = torch.randn(1, inputs[0].shape[2], 4, 8, dtype=torch.float64)
    with layout(Layout(segments)):
        found, _ = packed_attention(None, *inputs, None)
    grads = torch.autograd.grad((found * weights).sum(), inputs)
    wanted = torch.autograd.grad((dense(*inputs, segments, scale=8**-0.5) * weights).sum(), inputs)
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-10)


def test_compiled_it_is_one_node_for_scoring_and_has_gradients_for_training():
    segments = make_segments()
    compiled = torch.compile(packed_attention, backend="eager", fullgraph=False)
    inputs = tensors(segments)
    with layout(Layout(segments)):
        wanted, _ = packed_attention(None, *inputs, None)
        with torch.no_grad():
            torch.testing.assert_close(compiled(None, *inputs, None)[0], wanted)
        query = inputs[0].requires_grad_()
        found, _ = compiled(None, query, *inputs[1:], None)
        torch.testing.assert_close(found, wanted)
        (gradient,) = torch.autograd.grad(found.square().sum(), query)
        plain, _ = packed_attention(None, query, *inputs[1:], None)
        (known,) = torch.autograd.grad(plain.square().sum(), query)
        torch.testing.assert_close(gradient, known)


def test_bfloat16_is_no_further_from_the_truth_than_a_plain_sdpa_call():
    segments = make_segments(trees=6)
    query, key, value = tensors(segments, size=64, dtype=torch.bfloat16)
    truth = dense(query, key, value, segments, scale=64**-0.5)
    plain = F.scaled_dot_product_attention(
        query, key, value, visible(segments), enable_gqa=True
    ).transpose(1, 2)
    with layout(Layout(segments)):
        found, _ = packed_attention(None, query, key, value, None)
    error = (found.double() - truth).abs()
    usual = (plain.double() - truth).abs()
    # Both round the output to 8 bits of mantissa: 2^-9 of values up to about 3.
    assert error.max() <= usual.max() + 2**-8
    assert error.mean() <= usual.mean() * 1.2


def test_the_layout_reaches_the_thread_that_recomputes_layers_in_backward():
    segments = make_segments()
    query, key, value = tensors(segments)
    results = []
    with layout(Layout(segments)):
        thread = threading.Thread(
            target=lambda: results.append(packed_attention(None, query, key, value, None)[0])
        )
        thread.start()
        thread.join()
        here, _ = packed_attention(None, query, key, value, None)
    assert torch.equal(results[0], here)


def test_layouts_nest_and_end():
    outer, inner = Layout(make_segments(0)), Layout(make_segments(1))
    with layout(outer):
        with pytest.raises(RuntimeError), layout(inner):
            raise RuntimeError
        assert attention._layout is outer
    with pytest.raises(AssertionError, match=r"within attention\.layout"):
        packed_attention(None, *tensors(outer.segments), None)


@pytest.mark.parametrize(
    "asked",
    [
        {"s_aux": torch.zeros(4)},
        {"position_bias": torch.zeros(1, 4, 3, 3)},
        {"is_causal": False},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_packs_do_not_have_is_refused(asked):
    segments = make_segments()
    with layout(Layout(segments)), pytest.raises(ValueError, match="packs do not serve"):
        packed_attention(torch.nn.Identity(), *tensors(segments), None, **asked)


def test_a_mask_or_dropout_is_refused():
    segments = make_segments()
    with layout(Layout(segments)):
        with pytest.raises(AssertionError, match="neither mask nor dropout"):
            packed_attention(None, *tensors(segments), None, dropout=0.1)
        with pytest.raises(AssertionError, match="neither mask nor dropout"):
            packed_attention(None, *tensors(segments), torch.zeros(1))


class Config:
    model_type = "test"

    def __init__(self, **fields):
        vars(self).update(fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"layer_types": ["full_attention", "sliding_attention"]}, None),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention carry state"),
        ({"layer_types": ["chunked_attention"]}, "chunked attention"),
        ({"alibi": True}, "ALiBi"),
        ({"position_embedding_type": "alibi"}, "ALiBi"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_architectures_without_packs_are_named(fields, reason):
    found = attention.unserved(Config(**fields), torch.device("cpu"))
    assert found is None if reason is None else reason in found


def test_other_devices_are_not_served():
    assert "not on mps" in attention.unserved(Config(), torch.device("mps"))
