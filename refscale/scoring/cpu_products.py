"""Faster fp32 matrix products on AMD CPUs. Pure torch.

torch multiplies fp32 matrices on CPUs with MKL, whose AVX-512 kernels are tuned for Intel. torch
also carries oneDNN: on two Zen 4 cores, at the shapes of SmolLM2-135M and 2,048 to 4,096 rows, its
products reach 102-106 GFLOP/s a core where MKL's reach 88-95. Both are fp32 throughout; oneDNN adds
up in another order, with errors of the same size.

What it gives up: the operator is torch's own, but made for its compiler rather than for callers. So
it is used only where it is there and gives the right product.
"""

import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def use_onednn(model: Any) -> int:
    """Let the fp32 linear layers of a model multiply with oneDNN where that is faster.

    Args:
        model: On the CPU; with gradients enabled its layers work as before.

    Returns:
        The number of layers changed: 0 on other CPUs, in other dtypes, or if the operator is amiss.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module.weight.dtype == torch.float32
    ]
    if not layers or _vendor() != "AuthenticAMD" or not _works():
        return 0
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return F.linear(inputs, layer.weight, layer.bias)
    product = _product_compiled if torch.compiler.is_compiling() else _product
    return product(inputs, layer.weight, layer.bias)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


# One node of a compiled layer's graph: torch's compiler takes the operator only as it makes it.
_product_compiled = torch.library.custom_op("refscale::onednn_linear", _product, mutates_args=())


@_product_compiled.register_fake
def _product_compiled_shape(inputs: Tensor, weight: Tensor, _bias: Tensor | None) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], len(weight))


@torch.no_grad()
def _works() -> bool:
    inputs, weight, bias = torch.randn(1, 40, 96), torch.randn(24, 96), torch.randn(24)
    try:
        found = _product(inputs, weight, bias)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found, F.linear(inputs, weight, bias), rtol=1e-4, atol=1e-4)


def _vendor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    lines = (line for line in text.splitlines() if line.startswith("vendor_id"))
    return next(lines, "").partition(":")[2].strip()
