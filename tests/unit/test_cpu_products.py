"""oneDNN products in place of MKL's: same values, only where they belong."""

import pytest
import torch
from scoring_support import PACKED, build

from refscale.scoring import cpu_products
from refscale.scoring.cpu_products import use_onednn


@pytest.fixture
def amd(monkeypatch):
    monkeypatch.setattr(cpu_products, "_vendor", lambda: "AuthenticAMD")


def own(model):
    with torch.inference_mode():
        return model(input_ids=torch.arange(20)[None]).logits


def test_a_model_computes_the_same_and_can_still_be_trained(amd):
    model = build(*PACKED["llama"])
    before = own(model)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert use_onednn(model) == len(layers) == 15
    torch.testing.assert_close(own(model), before, rtol=1e-4, atol=1e-4)
    model(input_ids=torch.arange(20)[None]).logits.sum().backward()
    assert all(layer.weight.grad is not None for layer in layers)


def test_the_operator_is_called(amd, monkeypatch):
    model = build(*PACKED["qwen2"])
    assert use_onednn(model) > 0
    calls = []
    product = cpu_products._product

    def counted(*args):
        calls.append(args)
        return product(*args)

    monkeypatch.setattr(cpu_products, "_product", counted)
    own(model)
    assert len(calls) == 15


def test_a_layer_compiles_with_it(amd):
    # With the code generator: it is what refuses torch's operator in another form than its own.
    model = build(*PACKED["llama"])
    assert use_onednn(model)
    layer = model.model.layers[0].mlp
    inputs = torch.randn(1, 24, layer.gate_proj.in_features)
    compiled = torch.compile(layer.forward, dynamic=True, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(inputs), layer(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vendor", ["GenuineIntel", ""])
def test_other_cpus_keep_their_library(monkeypatch, vendor):
    monkeypatch.setattr(cpu_products, "_vendor", lambda: vendor)
    assert use_onednn(build(*PACKED["llama"])) == 0


def test_half_precision_is_left_alone(amd):
    # torch multiplies it with oneDNN anyway.
    assert use_onednn(build(*PACKED["llama"]).to(torch.bfloat16)) == 0


def wrong(inputs, weight, bias):
    return torch.zeros(*inputs.shape[:-1], len(weight))


def missing(inputs, weight, bias):
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


@pytest.mark.parametrize("product", [wrong, missing])
def test_an_operator_that_is_gone_or_wrong_is_not_used(amd, monkeypatch, product):
    monkeypatch.setattr(cpu_products, "_product", product)
    assert use_onednn(build(*PACKED["llama"])) == 0


def test_subclasses_of_linear_layers_are_left_alone(amd):
    class Own(torch.nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    assert use_onednn(torch.nn.Sequential(Own(4, 4))) == 0
