"""What a model's embedding and positions can take: refusals, and the switch of longrope."""

import numpy as np
import pytest
from scoring_support import LONGROPE, PACKED, build, family, own_sums

from refscale.errors import ModelError
from refscale.scoring.reference import EncodedPairs, ReferenceModel

PATHS = pytest.mark.parametrize("path", ["packed", "padded"])


def ids(*tokens):
    return np.array(tokens, dtype=np.int32)


@PATHS
def test_a_token_without_an_embedding_is_named(path):
    pairs = EncodedPairs([ids(1, 2)], [ids(3, 101)], [ids(4)])
    with pytest.raises(ModelError, match=r"token id 101, the model has 101 embeddings"):
        ReferenceModel.from_model(build(*PACKED["llama"]), path=path).score(pairs)


def test_a_sequence_beyond_learned_positions_is_refused_with_what_to_set():
    model = ReferenceModel.from_model(build(*PACKED["gpt2"]))
    prompt = np.ones(100, dtype=np.int32)

    def pair(tokens):
        return EncodedPairs([prompt], [np.ones(tokens, dtype=np.int32)], [ids(1)])

    # 128 positions, and the last token is not put in.
    assert np.isfinite(model.score(pair(29)).chosen_logps).all()
    with pytest.raises(ModelError, match=r"129 tokens.*encoding.max_length: 128"):
        model.score(pair(30))


@pytest.mark.parametrize("kind", ["GPTJ", "CodeGen", "CTRL", "OpenAIGPT"])
def test_positions_that_are_a_table_of_another_name_are_limits_too(kind):
    sizes = {"vocab_size": 101, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 128}
    if kind in ("GPTJ", "CodeGen"):
        sizes |= {"rotary_dim": 4, "bos_token_id": None, "eos_token_id": None}
    model = ReferenceModel.from_model(build(kind, sizes))
    pairs = EncodedPairs([np.ones(128, dtype=np.int32)], [ids(1)], [ids(2)])
    assert np.isfinite(model.score(pairs).chosen_logps).all()
    pairs = EncodedPairs([np.ones(128, dtype=np.int32)], [ids(1, 2)], [ids(2)])
    with pytest.raises(ModelError, match=r"129 tokens.*encoding.max_length: 128"):
        model.score(pairs)


@PATHS
def test_long_neighbours_do_not_change_the_positions_of_short_ones(path):
    rng = np.random.default_rng(0)

    def some(count):
        return rng.integers(0, 101, count).astype(np.int32)

    model = build(*LONGROPE)
    # Short, long, and a prompt that is long with one of its sides alone.
    pairs = EncodedPairs(
        [some(10), some(12), some(10)], [some(8), some(30), some(10)], [some(9), some(28), some(40)]
    )
    wanted = [
        *own_sums(model, pairs.prompt_ids, pairs.chosen_ids),
        *own_sums(model, pairs.prompt_ids, pairs.rejected_ids),
    ]
    scores = ReferenceModel.from_model(model, path=path).score(pairs)
    np.testing.assert_allclose(
        [*scores.chosen_logps, *scores.rejected_logps], wanted, rtol=0, atol=2e-3
    )


def test_positions_that_depend_on_all_before_are_refused_beyond_their_end():
    model = build(*family("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}))
    pairs = EncodedPairs([np.ones(127, dtype=np.int32)], [ids(1, 2)], [ids(1)])
    ReferenceModel.from_model(model).score(pairs)
    pairs = EncodedPairs([np.ones(127, dtype=np.int32)], [ids(1, 2, 3)], [ids(1)])
    with pytest.raises(ModelError, match=r"dynamic rope.*encoding.max_length: 128"):
        ReferenceModel.from_model(model).score(pairs)


def test_a_window_that_is_in_the_mask_alone_is_not_packed():
    kind = family(
        "Qwen2Moe",
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=0,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    model = ReferenceModel.from_model(build(*kind))
    assert model.path == "padded" and "sliding window" in model.info["path_reason"]
