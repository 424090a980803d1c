"""Tiled log-probs against log_softmax of the whole logits in float64."""

import types
from importlib.util import find_spec

import pytest
import torch
from scoring_support import LargestTensor

from refscale.scoring import logps
from refscale.scoring.logps import (
    Head,
    logps_of_logits,
    sequence_logps,
    token_logps,
)


def make_head(vocab=507, size=24, *, bias=True, multiplier=1.0, softcap=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return Head(
        weight=torch.randn(vocab, size, generator=generator).to(dtype),
        bias=torch.randn(vocab, generator=generator).to(dtype) if bias else None,
        multiplier=multiplier,
        softcap=softcap,
    )


def make_rows(count=253, size=24, vocab=507, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, size, generator=generator).to(dtype)
    return hidden, torch.randint(0, vocab, (count,), generator=generator)


def truth(hidden, head):
    """float64 (R, V) log-probs by the definition."""
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.multiplier
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits, dim=-1)


HEADS = [
    {},
    {"bias": False},
    {"multiplier": 0.0625},
    {"softcap": 3.0},
    {"softcap": 3.0, "multiplier": 2.5},
]


@pytest.fixture(params=[(512, 2048), (64, 100), (7, 507)], ids=str)
def tiles(request, monkeypatch):
    """Odd numbers of tiles of rows and of vocabulary."""
    monkeypatch.setattr(logps, "_TILE_CPU", request.param)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_log_probs_are_those_of_the_whole_log_softmax(tiles, options):
    head = make_head(**options)
    hidden, targets = make_rows()
    found, squares = token_logps(hidden, targets, head)
    wanted = truth(hidden, head).gather(1, targets[:, None])[:, 0]
    assert found.dtype == torch.float32 and squares is None
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_sum_squares_is_the_log_of_the_summed_squared_probabilities(tiles, options):
    head = make_head(**options)
    hidden, targets = make_rows()
    _, squares = token_logps(hidden, targets, head, sum_squares=True)
    wanted = truth(hidden, head).exp().square().sum(dim=-1).log()
    torch.testing.assert_close(squares.double(), wanted, rtol=1e-6, atol=2e-5)


def test_log_probs_of_given_logits_are_the_same():
    head = make_head()
    hidden, targets = make_rows(count=600)
    found, squares = logps_of_logits(truth(hidden, head), targets, sum_squares=True)
    other, other_squares = token_logps(hidden, targets, head, sum_squares=True)
    torch.testing.assert_close(found, other, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(squares, other_squares, rtol=1e-6, atol=2e-5)


def test_log_probs_of_given_logits_are_not_biased_by_a_long_vocabulary():
    logits = 3 * torch.randn(64, 256_000, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(64)
    wanted = torch.log_softmax(logits.double(), dim=-1).gather(1, targets[:, None])[:, 0]
    error = logps_of_logits(logits, targets)[0].double() - wanted
    assert error.abs().max() < 4e-6 and abs(error.mean()) < 1e-6


def test_bfloat16_is_no_further_from_the_truth_than_a_bf16_log_softmax():
    head = make_head(dtype=torch.bfloat16)
    hidden, targets = make_rows(dtype=torch.bfloat16)
    wanted = truth(hidden, head).gather(1, targets[:, None])[:, 0]
    naive = torch.log_softmax(torch.nn.functional.linear(hidden, head.weight, head.bias), dim=-1)
    usual = (naive.gather(1, targets[:, None])[:, 0].double() - wanted).abs()
    error = (token_logps(hidden, targets, head)[0].double() - wanted).abs()
    assert error.max() <= usual.max()
    assert error.mean() <= usual.mean() * 0.75  # neither log-sum-exp nor target are rounded


@pytest.mark.parametrize("vocab", [507, 5000])
def test_a_sure_model_keeps_its_small_log_probs_in_bfloat16(vocab):
    # Each target's logit is near 40, its neighbours' near 0: a rounded logit is off by up to 0.125.
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(vocab, 64, generator=generator)
    head = Head(weight.bfloat16(), bias=None, multiplier=1.0, softcap=None)
    targets = torch.randint(0, vocab, (200,), generator=generator)
    rows = weight[targets]
    hidden = (40 * rows / rows.square().sum(dim=-1, keepdim=True)).bfloat16()
    hidden = hidden + 0.02 * torch.randn(hidden.shape, generator=generator).bfloat16()
    wanted = truth(hidden, head).gather(1, targets[:, None])[:, 0]
    assert wanted.max() > -1e-6  # many are sure
    found, squares = token_logps(hidden, targets, head, sum_squares=True)
    assert found.max() <= 1e-5
    # What is left is the rounding of the other logits.
    torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=1e-5)
    assert squares.max() <= 1e-5


def test_large_logits_do_not_overflow():
    head = make_head(multiplier=1e4)
    hidden, targets = make_rows()
    found, _ = token_logps(hidden, targets, head)
    wanted = truth(hidden, head).gather(1, targets[:, None])[:, 0]
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0.1)


def test_no_rows_give_no_log_probs():
    found, squares = token_logps(
        torch.empty(0, 24), torch.empty(0, dtype=torch.int64), make_head(), sum_squares=True
    )
    assert found.shape == squares.shape == (0,)


@pytest.mark.parametrize("vocab", [49_152, 256_000])
def test_memory_does_not_grow_with_rows_times_vocabulary(vocab):
    size, count = 8, 1024
    head = Head(torch.randn(vocab, size), None, 1.0, None)
    hidden, targets = make_rows(count, size, vocab)
    with LargestTensor() as largest:
        found, _ = token_logps(hidden, targets, head, sum_squares=True)
    assert len(found) == count
    rows, width = logps._TILE_CPU
    assert count * 8 < largest.elements <= rows * width < count * vocab / 32


def test_a_shared_term_counts_for_each_of_its_sequences():
    values = torch.tensor([-1.0, -2.0, -4.0])
    # Sequence 0: terms 0 and 1; sequence 1: terms 0 and 2; sequence 2 has none.
    sums = sequence_logps(values, torch.tensor([0, 1, 0, 2]), torch.tensor([0, 0, 1, 1]), 3)
    assert sums.tolist() == [-3.0, -5.0, 0.0]
    assert sums.dtype == torch.float64


@pytest.mark.parametrize(
    ("fields", "multiplier"),
    [
        ({}, 1.0),
        ({"logit_scale": 0.25}, 0.25),
        ({"logit_scale": None}, 1.0),
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"output_multiplier": 3.0}, 3.0),
        ({"logits_scaling": 8.0}, 0.125),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
    ],
    ids=str,
)
def test_the_head_scales_logits_as_the_config_says(fields, multiplier):
    config = types.SimpleNamespace(**{"model_type": "test", **fields})
    config.get_text_config = lambda: config
    linear = torch.nn.Linear(3, 5)
    model = types.SimpleNamespace(config=config, get_output_embeddings=lambda: linear)
    head = Head.of(model)
    assert head.multiplier == multiplier
    assert head.weight is linear.weight and head.bias is linear.bias


@pytest.mark.skipif(find_spec("triton") is not None, reason="needs a torch without triton")
def test_a_gpu_without_triton_takes_the_steps_and_says_so(caplog):
    logps._fused_log_sum_exp.cache_clear()
    assert logps._fused_log_sum_exp(torch.device("cuda"), torch.float32) is None
    assert [record.message for record in caplog.records] == [
        "log-probs take several passes over each tile instead of one: No module named 'triton'"
    ]
