"""What a model's embedding and positions can take, read off the loaded model. torch, no forward.

In: a transformers causal LM. Out: its limits, and refusals in words instead of an IndexError on a
CPU or a dead context on a GPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from refscale.errors import ModelError

# Embeddings; and the tables that GPT-J, CodeGen and CTRL keep as plain tensors.
_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "positions_embed")
_TABLES = ("embed_positions", "pos_encoding")


@dataclass(frozen=True)
class Limits:
    """Limits in tokens, None where there is none.

    Attributes:
        num_embeddings: Token ids are below it.
        positions: A forward pass has at most so many, where they are rows of a table.
        rope_switch: Longrope: transformers takes other frequencies for all of a forward pass as
            soon as one of its sequences is longer. So longer and other sequences never share one.
        rope_end: Dynamic NTK: beyond it the frequencies depend on every length seen before.
    """

    num_embeddings: int | None = None
    positions: int | None = None
    rope_switch: int | None = None
    rope_end: int | None = None

    @classmethod
    def of(cls, model: Any) -> "Limits":
        """The limits of a transformers causal LM."""
        config = model.config.get_text_config()
        embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
        tables = [
            module.num_embeddings - getattr(module, "offset", 0)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
        ]
        tables += [
            len(table)
            for module in model.modules()
            for table in (getattr(module, name, None) for name in _TABLES)
            if isinstance(table, torch.Tensor)
        ]
        switch, end = [], []
        for rope in _rope_parameters(config):
            kind = str(rope.get("rope_type", "default"))
            if kind == "longrope":
                switch.append(int(rope["original_max_position_embeddings"]))
            elif "dynamic" in kind:
                end.append(int(config.max_position_embeddings))
        return cls(
            num_embeddings=embeddings,
            positions=min(tables, default=None),
            rope_switch=min(switch, default=None),
            rope_end=min(end, default=None),
        )

    def check(self, arrays: Iterable[np.ndarray], longest: int) -> None:
        """Refuse ids and lengths that the model cannot take.

        Args:
            arrays: Token ids.
            longest: Tokens of the longest forward pass of one sequence.

        Raises:
            ModelError: An id has no embedding, or a sequence is too long.
        """
        largest = max((int(ids.max()) for ids in arrays if len(ids)), default=0)
        if self.num_embeddings is not None and largest >= self.num_embeddings:
            raise ModelError(
                f"the corpus holds token id {largest}, the model has {self.num_embeddings}"
                " embeddings: use the tokenizer that belongs to it, or resize them"
            )
        for limit, why in (
            (self.positions, "has so many positions"),
            (
                self.rope_end,
                "stretches its positions beyond that by all it has seen (dynamic rope)",
            ),
        ):
            if limit is not None and longest > limit:
                raise ModelError(
                    f"the corpus holds a sequence of {longest} tokens, and the model {why}:"
                    f" {limit}; set encoding.max_length: {limit}"
                )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Those of the model, or of each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return nested or [given]
