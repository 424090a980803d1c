"""What the tests of the scoring engine share: tiny models of many families, pairs, and truths."""

import math

import numpy as np
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from refscale.scoring.packing import make_packs
from refscale.scoring.reference import EncodedPairs

VOCAB = 101
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from uniform
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LAYERS = ["sliding_attention", "full_attention"]
PER_LAYER = {
    "head_dim": 8,
    "sliding_window": 5,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": LAYERS * 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}


def family(name, **more):
    return name, {**COMMON, **more}


# Class prefix and config; windows are shorter than the sequences.
PACKED = {
    "llama": family("Llama", attention_bias=True),
    "qwen2": family("Qwen2"),
    "qwen2-window": family(
        "Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=0, layer_types=LAYERS
    ),
    "qwen3": family("Qwen3", head_dim=16),
    "mistral-window": family("Mistral", sliding_window=5, head_dim=8),
    "gemma2": family(
        "Gemma2",
        head_dim=8,
        sliding_window=5,
        layer_types=LAYERS,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=10,
    ),
    "gemma3": family("Gemma3", head_dim=8, sliding_window=5, layer_types=LAYERS),
    # Per-layer embeddings, keys and values that later layers share, heads of two sizes.
    "gemma3n": family("Gemma3n", **PER_LAYER, intermediate_size=[48, 48, 64, 64], laurel_rank=8),
    "gemma4": family("Gemma4", **PER_LAYER, global_head_dim=16, final_logit_softcapping=3.0),
    "gemma4-moe": family(
        "Gemma4",
        head_dim=8,
        sliding_window=5,
        layer_types=LAYERS,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
    ),
    "phi3": family("Phi3", sliding_window=7),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "gpt-neox": family("GPTNeoX", rotary_pct=0.25),
    "olmo2": family("Olmo2"),
    "mixtral": family("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": family(
        "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8
    ),
    "granite": family(
        "Granite",
        logits_scaling=4.0,
        attention_multiplier=0.3,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
    ),
    "cohere": family("Cohere", logit_scale=0.25),
    "smollm3": family("SmolLM3"),
}
# Positions change once a forward pass is longer than 32 tokens.
LONGROPE = family(
    "Phi3",
    original_max_position_embeddings=32,
    sliding_window=None,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
        "original_max_position_embeddings": 32,
    },
)
PADDED = {
    "mamba": (
        "Mamba",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "initializer_range": 0.3,
            "use_mambapy": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
    ),
    "qwen3-next": family(
        "Qwen3Next",
        layer_types=["linear_attention", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "bloom": (
        "Bloom",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
    ),
    "llama4": family("Llama4", head_dim=8, num_local_experts=4, intermediate_size_mlp=48),
    "recurrent-gemma": (
        "RecurrentGemma",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "logits_soft_cap": 3.0,
            "attention_window_size": 64,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
    ),
    "gpt-oss": family(
        "GptOss",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        layer_types=LAYERS,
    ),
}


def build(kind, config, seed=0):
    torch.manual_seed(seed)
    prefix = f"{kind}Text" if hasattr(transformers, f"{kind}TextConfig") else kind
    loaded = getattr(transformers, f"{prefix}Config")(**config)
    model = transformers.AutoModelForCausalLM.from_config(loaded).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms, biases and sinks start at constants that would hide mistakes.
            if parameter.dim() == 1 and "A_log" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_pairs(seed=0, prompts=(1, 3, 14, 9, 9), vocab=VOCAB):
    """Two pairs a prompt of the given length, some with completions in common."""
    rng = np.random.default_rng(seed)

    def ids(count):
        return rng.integers(0, vocab, count).astype(np.int32)

    rows = []
    for length in prompts:
        prompt, start = ids(length), ids(rng.integers(0, 4))
        pool = [np.concatenate([start, ids(rng.integers(1, 12))]) for _ in range(3)]
        rows += [(prompt, pool[0], pool[1]), (prompt, pool[2], pool[0])]
    return EncodedPairs(*map(list, zip(*rows, strict=True)))


@torch.no_grad()
def own_sums(model, prompts, completions):
    """float64 (N,) by the model's own full logits, a sequence at a time."""
    sums = []
    for prompt, completion in zip(prompts, completions, strict=True):
        whole = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
        whole = whole.to(model.device)
        logps = model(input_ids=whole[None]).logits[0].double().log_softmax(dim=-1)
        first = max(len(prompt), 1)
        sums.append(logps[range(first - 1, len(whole) - 1), whole[first:]].sum().item())
    return np.array(sums)


# -- attention -----------------------------------------------------------------------------------

ATTENTION_CASES = [
    {},
    {"window": 1},
    {"window": 3},
    {"window": 1000},
    {"softcap": 0.7},
    {"softcap": 0.7, "window": 4},
    {"scale": 0.9},
]


def make_segments(seed=0, trees=3, leaves=3):
    """A pack whose prompts share a start, of several completions, and some that share nothing."""
    rng = np.random.default_rng(seed)

    def ids(count):
        return rng.integers(0, 1000, count).astype(np.int32)

    sequences = []
    system = ids(5)
    for _ in range(trees):
        prompt = np.concatenate([system, ids(rng.integers(1, 12))])
        sequences += [(prompt, ids(rng.integers(1, 9))) for _ in range(leaves)]
    sequences += [(ids(0), ids(6)), (ids(0), ids(4)), (ids(7), ids(5))]
    (pack,) = make_packs(sequences, range(len(sequences)), 10_000)
    return pack.segments


def visible(segments, window=None):
    """Dense (T, T) bool: who sees whom."""
    total = max(s.start + s.length for s in segments)
    sees = torch.zeros(total, total, dtype=torch.bool)
    for s in segments:
        keys = [row for start, count in s.prefix for row in range(start, start + count)]
        for row in range(s.start, s.start + s.length):
            keys.append(row)
            sees[row, keys if window is None else keys[-window:]] = True
    return sees


def dense(query, key, value, segments, *, scale, window=None, softcap=None):
    """The same by the definition, in float64."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(segments, window), -math.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def tensors(segments, *, heads=4, kv_heads=2, size=8, value_size=None, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    total = max(s.start + s.length for s in segments)
    return (
        torch.randn(1, heads, total, size, generator=generator).to(dtype),
        torch.randn(1, kv_heads, total, size, generator=generator).to(dtype),
        torch.randn(1, kv_heads, total, value_size or size, generator=generator).to(dtype),
    )


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return result
