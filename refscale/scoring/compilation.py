"""Decoder layers that torch compiles: fewer passes over memory between the products.

A layer's norms, rotations, activations and residuals are bound by memory; compiled, each chain of
them reads and writes once. The layers of a model share their code, so that one compilation serves
all of one kind. No ray.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer


class CompiledLayers:
    """A model's decoder layers, compiled within `in_use` and as they were outside.

    Compilation itself happens at the first forward: what it raises, that forward raises.
    """

    def __init__(self, model: Any) -> None:
        layers = _layers(model)
        # Sizes are unknown from the start: packs differ, and each new size would compile again.
        compiled = {
            kind: torch.compile(kind.forward, dynamic=True) for kind in {type(m) for m in layers}
        }
        self._forwards = [(layer, MethodType(compiled[type(layer)], layer)) for layer in layers]

    @staticmethod
    def unserved(model: Any) -> str | None:
        """Why a model's layers are not compiled; None if they may be."""
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            return "its layers are on several GPUs"
        if getattr(model, "is_quantized", False):
            return "its weights are quantised"
        layers = _layers(model)
        if not layers:
            return f"{type(model).__name__} has no layers of a known kind"
        if any("forward" in vars(layer) for layer in layers):
            return "something else stands in for its layers' forward"
        return None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the layers run compiled."""
        for layer, forward in self._forwards:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, _forward in self._forwards:
                del layer.forward


def _layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
