"""The reference model: parity with TRL, invariance, retries, self-check."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from scoring_support import PACKED, PADDED, LargestTensor, build, family, make_pairs, own_sums
from transformers import masking_utils

from refscale.errors import ModelError
from refscale.scoring import attention, forward, logps
from refscale.scoring import reference as reference_module
from refscale.scoring.devices import is_out_of_memory
from refscale.scoring.flops import Flops
from refscale.scoring.forward import Forward
from refscale.scoring.packing import plan_packs
from refscale.scoring.padding import padded_batches
from refscale.scoring.reference import (
    NONFINITE,
    OUT_OF_MEMORY,
    EncodedPairs,
    ReferenceModel,
)
from refscale.scoring.results import ScoringStats, Sums
from refscale.scoring.self_check import checked_pairs, error_budget


def ids(*tokens):
    return np.array(tokens, dtype=np.int32)


@pytest.fixture(scope="module")
def llama():
    return build(*PACKED["llama"])


def both(scores):
    return np.concatenate([scores.chosen_logps, scores.rejected_logps])


PATHS = pytest.mark.parametrize("path", ["packed", "padded"])


def test_sums_are_those_of_trls_own_reference_pass(tiny_model, tmp_path):
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    pairs = make_pairs(prompts=(5, 1, 30, 17), vocab=250)
    rows = [
        {"prompt_ids": p.tolist(), "chosen_ids": c.tolist(), "rejected_ids": r.tolist()}
        for p, c, r in zip(pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids, strict=True)
    ]
    text = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    trainer = DPOTrainer(
        model=str(tiny_model),
        args=DPOConfig(
            output_dir=str(tmp_path), report_to=[], bf16=False, use_cpu=True, max_length=1024
        ),
        train_dataset=datasets.Dataset.from_list(text),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    batch = DataCollatorForPreference(pad_token_id=0, max_length=1024)(rows)
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    for path in ("packed", "padded"):
        scores = ReferenceModel.load(str(tiny_model), dtype="float32", path=path).score(pairs)
        np.testing.assert_allclose(scores.chosen_logps, chosen, rtol=0, atol=1e-3)
        np.testing.assert_allclose(scores.rejected_logps, rejected, rtol=0, atol=1e-3)


@PATHS
def test_float32_is_within_the_budget_of_float64(llama, path):
    pairs = make_pairs(3, prompts=(20, 40, 7))
    scores = ReferenceModel.from_model(llama, path=path).score(pairs)
    double = build(*PACKED["llama"]).double()
    truth = np.concatenate(
        [own_sums(double, pairs.prompt_ids, s) for s in (pairs.chosen_ids, pairs.rejected_ids)]
    )
    assert np.abs(both(scores) - truth).max() < 2e-3
    # And a float64 model stays one.
    found = both(ReferenceModel.from_model(double, path=path).score(pairs))
    np.testing.assert_allclose(found, truth.astype(np.float32), rtol=1e-6)


def test_bfloat16_is_no_further_from_the_truth_than_the_models_own_forward():
    double = build(*PACKED["llama"]).double()
    half = build(*PACKED["llama"]).to(torch.bfloat16)
    # The truth of the same, rounded, weights.
    double.load_state_dict({k: v.double() for k, v in half.state_dict().items()})
    pairs = make_pairs(4, prompts=(9,) * 20)
    sides = (pairs.chosen_ids, pairs.rejected_ids)
    truth = np.concatenate([own_sums(double, pairs.prompt_ids, s) for s in sides])
    usual = np.concatenate([own_sums(half, pairs.prompt_ids, s) for s in sides]) - truth
    reference = ReferenceModel.from_model(half)
    assert reference.self_check(pairs).path == "packed"
    error = both(reference.score(pairs)) - truth
    assert np.sqrt(np.mean(error**2)) <= 1.1 * np.sqrt(np.mean(usual**2))
    assert np.abs(error).max() <= np.abs(usual).max() + 0.1


@PATHS
def test_scores_do_not_depend_on_neighbours_order_or_budget(llama, path):
    pairs = make_pairs(5, prompts=(1, 3, 14, 9, 9, 21))
    wanted = both(ReferenceModel.from_model(llama, path=path, token_budget=4096).score(pairs))
    order = np.random.default_rng(0).permutation(len(pairs))
    for budget in (1, 17, 50):
        reference = ReferenceModel.from_model(llama, path=path, token_budget=budget)
        found = both(reference.score(pairs.take(order.tolist())))
        np.testing.assert_allclose(found, wanted.reshape(2, -1)[:, order].ravel(), atol=2e-4)
    alone = [reference.score(pairs.take([i])) for i in range(len(pairs))]
    np.testing.assert_allclose([s.chosen_logps[0] for s in alone], wanted[: len(pairs)], atol=2e-4)


@PATHS
def test_counts_and_empty_prompts(llama, path):
    pairs = EncodedPairs(
        [ids(), ids(4, 5), ids()],
        [ids(1), ids(2, 3), ids(7, 8, 9)],
        [ids(6, 7), ids(2, 3, 4), ids(7, 8)],
    )
    scores = ReferenceModel.from_model(llama, path=path).score(pairs)
    assert scores.num_prompt_tokens.tolist() == [0, 2, 0]
    assert scores.num_chosen_tokens.tolist() == [0, 2, 2]
    assert scores.num_rejected_tokens.tolist() == [1, 3, 1]
    assert scores.chosen_logps[0] == 0.0  # nothing predicts a first token
    for column in (scores.num_prompt_tokens, scores.num_chosen_tokens, scores.num_rejected_tokens):
        assert column.dtype == np.int32
    assert scores.chosen_logps.dtype == scores.rejected_logps.dtype == np.float32
    truth = own_sums(llama, pairs.prompt_ids[1:], pairs.chosen_ids[1:])
    np.testing.assert_allclose(scores.chosen_logps[1:], truth, atol=1e-4)
    # Nothing but unpredicted tokens.
    nothing = ReferenceModel.from_model(llama, path=path).score(
        EncodedPairs([ids()], [ids(1)], [ids(2)])
    )
    assert both(nothing).tolist() == [0.0, 0.0] and nothing.reason == [None]


def test_no_pairs_give_no_scores(llama):
    scores = ReferenceModel.from_model(llama).score(EncodedPairs([], [], []))
    assert both(scores).shape == (0,) and scores.reason == []


@PATHS
def test_stats_count_what_was_done(llama, path):
    prompt = ids(*range(10))
    pairs = EncodedPairs([prompt] * 2, [ids(1, 2, 3), ids(4, 5)], [ids(6, 7, 8), ids(1, 2, 3)])
    stats = ReferenceModel.from_model(llama, path=path).score(pairs).stats
    assert stats.pairs == 2
    assert stats.useful_tokens == 10 + 3 + 3 + 2  # the repeated completion once
    # Packed: the last token of each completion is not computed. Padded: 3 rows of 12.
    assert stats.computed_tokens == {"packed": 10 + 2 + 2 + 1, "padded": 36}[path]
    assert stats.head_rows == 8
    flops = Flops.of(llama)
    # Packed context: 10 * 11 / 2 of the prompt; each row sees what comes before it and itself.
    context = {"packed": 55 + (11 + 12) * 2 + 11, "padded": 3 * 12 * 13 / 2}[path]
    assert stats.flops == flops.total(stats.computed_tokens, 8, context)
    # q and o 32 x 32, k and v 32 x 16, MLP 3 x 32 x 48, two layers; head 101 x 32.
    assert flops.per_token == 2 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert flops.per_head_row == 2 * 101 * 32
    assert flops.per_context == 4 * 2 * 32
    assert stats.seconds > 0 and stats.peak_memory_bytes > 2**20


def test_flops_count_the_experts_that_a_token_takes_and_shared_ones_whole():
    sizes = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    more = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4}
    heads = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    dense = {"v_head_dim": 8, "first_k_dense_replace": 0}
    model = build(*family("DeepseekV3", **sizes, **more, **heads, **dense))
    others = [p for n, p in model.named_parameters() if "self_attn" in n and p.dim() > 1]
    # A router of 8 x 32, and 2 routed experts and a shared one of 3 x 32 x 16, two layers.
    experts = 2 * (8 * 32 + 3 * 3 * 32 * 16)
    assert Flops.of(model).per_token == 2 * (sum(p.numel() for p in others) + experts)


@PATHS
def test_a_forward_asks_no_value_of_the_device(monkeypatch, path):
    # A meta tensor has none: where a GPU would wait, or tensors of two devices meet, it raises.
    # What transformers asks itself, once a padded batch, cannot be helped.
    monkeypatch.setattr(attention, "_no_varlen", lambda *tensors: None)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    pairs = make_pairs()
    model = Forward(build(*PACKED["llama"]).to(torch.bfloat16).to("meta"))
    plan = plan_packs(pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids, 4096)
    batches = {
        "packed": plan.packs,
        "padded": padded_batches(plan.sequences, range(plan.num_sequences), 4096),
    }[path]
    sums = Sums(plan.num_sequences, squares=True)
    with model.attending(path):
        for batch in batches:
            model.score(batch, sums, ScoringStats())
    assert {rows.device.type for _, rows in sums._pending} == {"meta"}


@PATHS
def test_sum_squares_is_the_mean_log_of_the_summed_squares(llama, path):
    pairs = make_pairs(6)
    plain = ReferenceModel.from_model(llama, path=path).score(pairs)
    assert plain.chosen_log_sum_squares is None
    scores = ReferenceModel.from_model(llama, path=path).score(pairs, sum_squares=True)
    np.testing.assert_array_equal(both(scores), both(plain))
    found = scores.rejected_log_sum_squares
    for i, (prompt, completion) in enumerate(
        zip(pairs.prompt_ids, pairs.rejected_ids, strict=True)
    ):
        whole = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
        with torch.no_grad():
            probs = llama(input_ids=whole[None]).logits[0].double().softmax(dim=-1)
        rows = probs[len(prompt) - 1 : len(whole) - 1]
        assert found[i] == pytest.approx(rows.square().sum(-1).log().mean().item(), abs=1e-5)


# -- memory ----------------------------------------------------------------------------------------


@pytest.fixture
def limit_tokens(monkeypatch):
    """Forwards of more than so many rows, or keys, run out of memory; the sizes of the others."""
    sizes = []

    def limit(rows, keys=math.inf):
        score = Forward.score

        def limited(self, batch, sums, stats):
            if batch.num_tokens > rows or getattr(batch, "num_keys", 0) > keys:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            sizes.append(batch.num_tokens)
            score(self, batch, sums, stats)

        monkeypatch.setattr(Forward, "score", limited)
        return sizes

    return limit


@PATHS
def test_out_of_memory_halves_the_budget_and_loses_nothing(llama, limit_tokens, path):
    pairs = make_pairs(7, prompts=(12, 20, 9, 15, 11, 8, 17, 30))
    wanted = both(ReferenceModel.from_model(llama, path=path).score(pairs))
    sizes = limit_tokens(100)
    reference = ReferenceModel.from_model(llama, path=path, token_budget=200)
    scores = reference.score(pairs)
    np.testing.assert_allclose(both(scores), wanted, atol=2e-4)
    # 200 -> at most 100, or 64 from a batch that was not full; then nothing runs out again.
    assert 64 <= reference.token_budget <= 100
    assert scores.stats.token_budget == reference.token_budget
    assert 1 <= scores.stats.oom_retries <= 2
    assert max(sizes) <= 100
    assert reference.score(pairs).stats.oom_retries == 0


def test_where_keys_fill_the_memory_packs_have_fewer_and_go_on_sharing(llama, limit_tokens):
    system = ids(*np.arange(80) % 100)
    sides = [[ids(i, k, 7) for i in range(30)] for k in range(2)]
    pairs = EncodedPairs([system] * 30, *sides)
    model = ReferenceModel.from_model(llama, path="packed")
    wanted = both(model.score(pairs))
    sizes = limit_tokens(1000, keys=1500)
    scores = model.score(pairs)
    np.testing.assert_allclose(both(scores), wanted, atol=2e-4)
    assert model.token_budget >= 1000 and scores.stats.oom_retries <= 2
    # 60 sequences of 82 rows, of which at least 9 share a pack.
    assert len(sizes) <= 60 / 9 + 1 and sum(sizes) < 60 * 82 / 5


@PATHS
def test_a_pair_that_does_not_fit_alone_gets_a_reason(llama, limit_tokens, path):
    pairs = make_pairs(8, prompts=(60, 5))
    wanted = ReferenceModel.from_model(llama, path=path).score(pairs)
    limit_tokens(40)
    scores = ReferenceModel.from_model(llama, path=path).score(pairs)
    assert scores.reason == [OUT_OF_MEMORY] * 2 + [None] * 2
    assert np.isnan(scores.chosen_logps[:2]).all()
    np.testing.assert_allclose(scores.chosen_logps[2:], wanted.chosen_logps[2:], atol=2e-4)


def test_out_of_memory_of_hosts_is_known_too_and_other_errors_pass(llama, monkeypatch):
    text = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you"
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))

    def broken(self, batch, sums, stats):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Forward, "score", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        ReferenceModel.from_model(llama).score(make_pairs())


def test_a_vocabulary_of_256k_never_meets_all_rows():
    kind, config = PACKED["llama"]
    model = build(kind, {**config, "vocab_size": 256_000, "tie_word_embeddings": True})
    pairs = make_pairs(9, prompts=(5,) * 150)
    reference = ReferenceModel.from_model(model, token_budget=4096)
    with LargestTensor() as largest:
        stats = reference.score(pairs).stats
    rows, width = logps._TILE_CPU
    assert stats.head_rows > 2 * rows
    # The largest tensors are a tile and the model's own weights.
    assert largest.elements <= max(rows * width, 256_000 * 32)
    assert largest.elements < stats.head_rows * 256_000 / 32


# -- what is not finite ----------------------------------------------------------------------------


def test_what_overflows_in_float16_is_scored_again_in_float32(caplog):
    model = build(*PACKED["llama"])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3e4)
    pairs = make_pairs(10)
    truth = own_sums(build_from(model.half()), pairs.prompt_ids, pairs.chosen_ids)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    reference = ReferenceModel.from_model(model)
    scores = reference.score(pairs)
    assert scores.reason == [None] * len(pairs)
    assert "log-probs in float16 that are not finite" in caplog.text
    np.testing.assert_allclose(scores.chosen_logps, truth, rtol=1e-4, atol=1e-2)
    # The model is what it was, and can be trained.
    assert reference.dtype == torch.float16
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float16 and torch.equal(parameter, weights[name])
    model.float()(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()


def build_from(half):
    """The float32 model of the same weights."""
    model = build(*PACKED["llama"])
    model.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    return model


@PATHS
def test_what_is_not_finite_in_float32_either_gets_a_reason_and_spares_the_rest(path):
    model = build(*PACKED["llama"])
    with torch.no_grad():
        model.model.embed_tokens.weight[100] = float("nan")
    rng = np.random.default_rng(11)

    def some(count):
        return rng.integers(0, 99, count).astype(np.int32)

    pairs = EncodedPairs(
        [some(5), ids(1, 100, 2), some(6)], [some(4) for _ in "abc"], [some(3) for _ in "abc"]
    )
    scores = ReferenceModel.from_model(model, path=path).score(pairs)
    assert scores.reason == [None, NONFINITE, None]
    assert np.isfinite(both(scores).reshape(2, 3)[:, [0, 2]]).all()


# -- the self-check --------------------------------------------------------------------------------


def wrong_attention(module, query, key, value, attention_mask, **options):
    """Segments see nothing of their prefix."""
    segments = attention._layout.segments
    blind = [type(s)(s.start, s.length, ()) for s in segments]
    with attention.layout(attention.Layout(blind)):
        return attention.packed_attention(module, query, key, value, attention_mask, **options)


def broken_attention(*args, **options):
    raise RuntimeError("shapes do not match")


@pytest.fixture
def packed_attention_as():
    def use(function):
        attention.AttentionInterface.register(attention.PACKED, function)

    yield use
    use(attention.packed_attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [wrong_attention, broken_attention])
def test_the_self_check_catches_a_wrong_path_and_falls_back(packed_attention_as, function, dtype):
    model = build(*PACKED["llama"]).to(dtype)
    pairs = make_pairs(12)
    packed_attention_as(function)
    reference = ReferenceModel.from_model(model)
    assert reference.path == "packed"
    settled = reference.self_check(pairs)
    assert reference.path == settled.path == "padded"
    assert settled.largest_error["packed"] > 1
    assert "failed the self-check" in reference.info["path_reason"]
    truth = own_sums(model, pairs.prompt_ids, pairs.chosen_ids)
    budget = error_budget(truth, np.array([len(c) for c in pairs.chosen_ids]), dtype)
    assert (np.abs(reference.score(pairs).chosen_logps - truth) <= budget).all()


@pytest.mark.parametrize(("off_by", "right"), [(0.02, True), (50.0, False)])
def test_what_the_models_own_rounding_does_is_no_fault_of_a_path(llama, monkeypatch, off_by, right):
    # The truth alone takes one sequence at a time, and here differs for it.
    own = ReferenceModel._own_sums
    monkeypatch.setattr(ReferenceModel, "_own_sums", lambda *args: own(*args) + off_by)
    reference = ReferenceModel.from_model(llama)
    if right:
        settled = reference.self_check(make_pairs(12))
        assert settled.path == "packed" and settled.budget > 1e-2
        assert settled.largest_error["packed"] == pytest.approx(off_by, rel=0.1)
    else:
        with pytest.raises(ModelError, match="no path gives the model's own log-probs"):
            reference.self_check(make_pairs(12))


def test_a_forced_path_that_fails_is_an_error(llama, packed_attention_as):
    packed_attention_as(wrong_attention)
    reference = ReferenceModel.from_model(llama, path="packed")
    with pytest.raises(ModelError, match=r"packed path is off by .* use score.path: auto"):
        reference.self_check(make_pairs(12))


def test_a_path_that_cannot_be_compiled_is_taken_as_it_is(llama, monkeypatch, caplog):
    def no_compiler(function, **options):
        def broken(*args, **named):
            raise RuntimeError("no C compiler")

        return broken

    monkeypatch.setattr(torch, "compile", no_compiler)
    pairs = make_pairs()
    wanted = ReferenceModel.from_model(llama, compilation="off").score(pairs)
    reference = ReferenceModel.from_model(llama, compilation="on")
    for _ in "ab":  # it is not tried again
        np.testing.assert_array_equal(both(reference.score(pairs)), both(wanted))
    assert [record.message for record in caplog.records] == [
        "the packed path is not compiled: compiled, it breaks off: no C compiler"
    ]
    assert reference.info["compiled"] == "no: compiled, it breaks off: no C compiler"


def test_a_path_that_is_wrong_once_compiled_is_taken_as_it_is(llama, monkeypatch):
    def off_by_a_bit(function, **options):
        return lambda *args, **named: function(*args, **named) * 1.1

    monkeypatch.setattr(torch, "compile", off_by_a_bit)
    pairs = make_pairs()
    reference = ReferenceModel.from_model(llama, compilation="on")
    scores = reference.score(pairs)
    assert reference.info["compiled"].startswith("no: compiled, it is off by")
    wanted = ReferenceModel.from_model(llama, compilation="off").score(pairs)
    np.testing.assert_array_equal(both(scores), both(wanted))


def test_work_is_compiled_unasked_once_it_is_long(monkeypatch, llama):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    pairs = make_pairs()
    for after, compiled in ((None, None), (3600.0, None), (1e-9, "yes")):
        monkeypatch.setattr(reference_module, "compile_after", lambda *_, after=after: after)
        reference = ReferenceModel.from_model(llama)
        reference.score(pairs)
        assert "compiled" not in reference.info, "it had not worked yet"
        reference.score(pairs)
        assert reference.info.get("compiled") == compiled


def test_a_compilation_without_memory_costs_no_budget(llama, monkeypatch):
    def no_memory(function, **options):
        def broken(*args, **named):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return broken

    monkeypatch.setattr(torch, "compile", no_memory)
    reference = ReferenceModel.from_model(llama, compilation="on", token_budget=64)
    reference.score(make_pairs())
    assert reference.info["compiled"] == "no: compiled, it does not fit into memory"
    assert reference.token_budget == 64


def test_the_padded_path_says_that_it_is_not_compiled(llama):
    reference = ReferenceModel.from_model(llama, path="padded", compilation="on")
    reference.score(make_pairs())
    assert reference.info["compiled"] == "no: pairs are scored in padded batches"


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"hf_device_map": {"model": 0, "lm_head": 1}}, "its layers are on several GPUs"),
        ({"is_quantized": True}, "its weights are quantised"),
    ],
    ids=["several GPUs", "quantised"],
)
def test_what_is_not_compiled_is_said(monkeypatch, facts, why):
    model = build(*PACKED["llama"])
    for name, value in facts.items():
        monkeypatch.setattr(model, name, value, raising=False)
    reference = ReferenceModel.from_model(model, compilation="on")
    reference.score(make_pairs())
    assert reference.info["compiled"] == f"no: {why}"


def test_a_forced_path_that_is_not_served_is_an_error():
    with pytest.raises(ModelError, match=r"score.path is packed, but .*state"):
        ReferenceModel.from_model(build(*PADDED["mamba"]), path="packed")


def test_an_unknown_head_falls_back_to_the_models_own_logits(llama, monkeypatch):
    of = logps.Head.of

    def wrong(model):
        head = of(model)
        return logps.Head(head.weight, head.bias, 2.0, None)

    monkeypatch.setattr(forward.Head, "of", wrong)
    pairs = make_pairs(13)
    reference = ReferenceModel.from_model(llama)
    settled = reference.self_check(pairs)
    assert settled.path == "padded" and "the model's own logits" in settled.reason
    scores = reference.score(pairs, sum_squares=True)
    truth = own_sums(llama, pairs.prompt_ids, pairs.chosen_ids)
    np.testing.assert_allclose(scores.chosen_logps, truth, atol=1e-3)
    monkeypatch.undo()
    squares = ReferenceModel.from_model(llama).score(pairs, sum_squares=True)
    np.testing.assert_allclose(
        scores.chosen_log_sum_squares, squares.chosen_log_sum_squares, atol=1e-4
    )


def test_the_self_check_reads_pairs_from_short_to_long():
    lengths = [5, 3000, 9, 100, 2000, 1, 2500, 400]
    pairs = EncodedPairs(
        [np.zeros(n, np.int32) for n in lengths],
        [ids(1)] * len(lengths),
        [ids(2)] * len(lengths),
    )
    # Of those up to 2,048 tokens: 1, 5, 9, 100, 400, 2000.
    assert [len(p) for p in checked_pairs(pairs).prompt_ids] == [1, 9, 100, 2000]
    assert [len(p) for p in checked_pairs(pairs.take([1, 6])).prompt_ids] == [2500]


def test_a_self_check_whose_logits_do_not_fit_takes_shorter_pairs(llama, monkeypatch, caplog):
    score = Forward.score_own_logits
    most = 40

    def limited(self, batch, sums):
        if batch.num_tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        score(self, batch, sums)

    monkeypatch.setattr(Forward, "score_own_logits", limited)
    pairs = EncodedPairs([ids(*range(n)) for n in (90, 5, 60, 20)], [ids(1)] * 4, [ids(2, 3)] * 4)
    settled = ReferenceModel.from_model(llama).self_check(pairs)
    assert settled.path == "packed" and settled.largest_error["packed"] < 1e-3
    left_out = [r.args[0] for r in caplog.records if "no memory to check" in r.message]
    assert left_out == [92, 62]
    most = 1
    with pytest.raises(ModelError, match=r"all logits of a pair of 7 tokens.*encoding.max_length"):
        ReferenceModel.from_model(llama).self_check(pairs)


def test_budgets_are_tight_in_float32_and_grow_with_length_in_half_precision():
    sums, counts = np.array([-100.0, -400.0]), np.array([25, 100])
    np.testing.assert_allclose(error_budget(sums, counts, torch.float32), [0.003, 0.009])
    # 0.25 * 5 + 1, 0.25 * 10 + 4
    np.testing.assert_allclose(error_budget(sums, counts, torch.bfloat16), [2.25, 6.5])


def test_ids_are_read_from_arrow_without_a_copy():
    column = pa.array([[1, 2], [], [3]], pa.list_(pa.int32()))
    table = pa.table(dict.fromkeys(["prompt_ids", "chosen_ids", "rejected_ids"], column))
    table = pa.concat_tables([table, table.slice(1)])
    pairs = EncodedPairs.from_table(table)
    assert [x.tolist() for x in pairs.prompt_ids] == [[1, 2], [], [3], [], [3]]
    base = column.values.to_numpy()
    assert np.shares_memory(pairs.prompt_ids[0], base)
    assert [x.tolist() for x in pairs.take([4, 0]).chosen_ids] == [[3], [1, 2]]


def test_padded_batches_hold_sequences_of_about_equal_length():
    sequences = [(ids(*range(n)), ids(1, 2)) for n in (1, 30, 2, 29, 3)]
    batches = list(padded_batches(sequences, range(5), 70))
    assert [b.sequences.tolist() for b in batches] == [[1, 3], [4, 2, 0]]
    assert [b.ids.shape for b in batches] == [(2, 31), (3, 4)]
    assert all(b.num_tokens <= 70 for b in batches)
    assert [len(b.sequences) for b in padded_batches(sequences, range(5), 1)] == [1] * 5
