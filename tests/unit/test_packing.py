"""Packs, by replaying what each row of a pack sees and comparing with the plain sequences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refscale.scoring.packing import Pack, key_index, make_packs, plan_packs


def ids(*tokens):
    return np.array(tokens, dtype=np.int32)


def contexts(pack: Pack) -> list[list[int]]:
    """The ids that each row sees, itself last."""
    found = []
    for s in pack.segments:
        seen = [i for start, n in s.prefix for i in pack.ids[start : start + n].tolist()]
        for row in range(s.start, s.start + s.length):
            seen.append(int(pack.ids[row]))
            found.append([*seen])
    return found


def predictions(pack: Pack) -> list[list[tuple[tuple[int, ...], int]]]:
    """Of each sequence of a pack: (what is seen, what is predicted) for each of its terms."""
    of = [[] for _ in pack.sequences]
    contexts_of = contexts(pack)
    for term, owner in zip(pack.terms.tolist(), pack.owners.tolist(), strict=True):
        of[owner].append((tuple(contexts_of[pack.rows[term]]), int(pack.targets[term])))
    return of


def expected(prompt, completion) -> list[tuple[tuple[int, ...], int]]:
    whole = [*prompt.tolist(), *completion.tolist()]
    first = max(len(prompt), 1)
    return [(tuple(whole[:t]), whole[t]) for t in range(first, len(whole))]


def check(plan, token_budget):
    """All that a plan promises."""
    scored = [number for pack in plan.packs for number in pack.sequences.tolist()]
    assert sorted(scored) == list(range(plan.num_sequences))
    for pack in plan.packs:
        assert pack.num_tokens <= token_budget or len(pack.sequences) == 1
        assert pack.num_tokens == sum(s.length for s in pack.segments)
        ends = [0, *(s.start + s.length for s in pack.segments)]
        assert [s.start for s in pack.segments] == ends[:-1] and all(
            s.length and all(start + n <= s.start for start, n in s.prefix) for s in pack.segments
        )
        assert len(pack.rows) == len(pack.targets) and len(pack.terms) == len(pack.owners)
        seen = contexts(pack)
        assert pack.context == sum(map(len, seen))
        assert pack.positions.tolist() == [len(ids) - 1 for ids in seen]
        # Nothing is there twice.
        assert len({tuple(ids) for ids in seen}) == pack.num_tokens
        for number, found in zip(pack.sequences.tolist(), predictions(pack), strict=True):
            prompt, completion = plan.sequences[number]
            assert found == expected(prompt, completion)
            assert plan.num_scored[number] == len(found)


# Few tokens, so that prefixes and whole sequences repeat; of one byte and of four.
token = st.sampled_from([0, 1, 256, 2**31 - 1])
prompt_ids = st.lists(token, max_size=9).map(lambda x: ids(*x))
completion_ids = st.lists(token, min_size=1, max_size=9).map(lambda x: ids(*x))


@st.composite
def corpora(draw):
    """Pairs of which many share a prompt, and of these many a completion; some prompts go on."""
    prompts = draw(st.lists(prompt_ids, min_size=1, max_size=4))
    for prompt in prompts[: draw(st.integers(0, 2))]:
        prompts.append(np.concatenate([prompt, draw(completion_ids)]))
    pools = [draw(st.lists(completion_ids, min_size=1, max_size=5)) for _ in prompts]
    count = draw(st.integers(1, 12))
    which = [draw(st.integers(0, len(prompts) - 1)) for _ in range(count)]
    return (
        [prompts[i] for i in which],
        [draw(st.sampled_from(pools[i])) for i in which],
        [draw(st.sampled_from(pools[i])) for i in which],
    )


@settings(max_examples=300, deadline=None)
@given(corpora(), st.integers(1, 40))
def test_every_completion_token_is_scored_once_after_just_its_own_prefix(corpus, token_budget):
    plan = plan_packs(*corpus, token_budget)
    for side, numbers in ((corpus[1], plan.chosen), (corpus[2], plan.rejected)):
        for prompt, completion, number in zip(corpus[0], side, numbers.tolist(), strict=True):
            assert plan.sequences[number][0].tolist() == prompt.tolist()
            assert plan.sequences[number][1].tolist() == completion.tolist()
    check(plan, token_budget)


@settings(max_examples=100, deadline=None)
@given(corpora(), st.integers(1, 40), st.integers(0, 20))
def test_no_pack_holds_sequences_on_both_sides_of_a_switch(corpus, token_budget, switch):
    plan = plan_packs(*corpus, token_budget, switch=switch)
    check(plan, token_budget)
    for pack in plan.packs:
        lengths = [sum(map(len, plan.sequences[n])) - 1 for n in pack.sequences.tolist()]
        assert len({length > switch for length in lengths}) == 1


@settings(max_examples=100, deadline=None)
@given(corpora(), st.integers(1, 40))
def test_equal_sequences_are_there_once(corpus, token_budget):
    plan = plan_packs(*corpus, token_budget)
    distinct = {
        (tuple(p.tolist()), tuple(c.tolist()))
        for side in corpus[1:]
        for p, c in zip(corpus[0], side, strict=True)
    }
    assert plan.num_sequences == len(distinct)
    prompts = {tuple(p.tolist()) for p in corpus[0]}
    # P + C + R of what is distinct
    useful = sum(map(len, prompts)) + sum(len(c) for _, c in distinct)
    assert plan.useful_tokens == useful


@settings(max_examples=100, deadline=None)
@given(corpora(), st.integers(1, 40), st.data())
def test_any_subset_of_the_sequences_packs_under_any_smaller_budget(corpus, token_budget, data):
    plan = plan_packs(*corpus, 40)
    numbers = data.draw(st.sets(st.integers(0, plan.num_sequences - 1), min_size=1))
    packs = make_packs(plan.sequences, sorted(numbers), token_budget)
    assert sorted(n for pack in packs for n in pack.sequences.tolist()) == sorted(numbers)
    for pack in packs:
        assert pack.num_tokens <= token_budget or len(pack.sequences) == 1
        for number, found in zip(pack.sequences.tolist(), predictions(pack), strict=True):
            assert found == expected(*plan.sequences[number])


def test_a_pair_is_laid_out_with_its_prompt_and_common_prefix_once():
    plan = plan_packs([ids(1, 2, 3)], [ids(7, 8, 9)], [ids(7, 5)], 64)
    (pack,) = plan.packs
    # 1 2 3 7 of both, then 8 of chosen; what predicts nothing, 9 and 5, is left out.
    assert pack.ids.tolist() == [1, 2, 3, 7, 8]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4]
    # Row 2 predicts the common 7 for both, row 3 both 5 and 8, row 4 predicts 9.
    assert pack.rows.tolist() == [2, 3, 3, 4]
    assert pack.targets.tolist() == [7, 5, 8, 9]
    assert np.bincount(pack.owners).tolist() == [2, 3]
    assert plan.useful_tokens == 3 + 3 + 2


def test_the_prompt_of_four_completions_is_computed_once():
    prompt = ids(*range(20))
    completions = [ids(30 + i, 40 + i, 50 + i) for i in range(4)]
    pairs = [(i, j) for i in range(4) for j in range(i)]  # 6 pairs
    plan = plan_packs(
        [prompt] * 6, [completions[i] for i, _ in pairs], [completions[j] for _, j in pairs], 64
    )
    (pack,) = plan.packs
    assert plan.num_sequences == 4
    assert pack.num_tokens == 20 + 4 * 2  # each completion's last token is left out
    check(plan, 64)


@pytest.mark.parametrize("length", [1, 2, 90])
def test_a_sequence_over_the_budget_has_a_pack_to_itself(length):
    long = ids(*np.arange(length) % 7)
    plan = plan_packs([long, ids(1)], [ids(1, 2), ids(3)], [ids(4), ids(5)], 10)
    check(plan, 10)
    if length == 90:
        over = [pack for pack in plan.packs if pack.num_tokens > 10]
        assert [len(pack.sequences) for pack in over] == [1, 1]


def test_an_empty_prompt_leaves_the_first_token_unscored():
    plan = plan_packs([ids(), ids()], [ids(5), ids(6, 7)], [ids(6, 8), ids(9)], 64)
    assert plan.num_scored[plan.chosen].tolist() == [0, 1]
    assert plan.num_scored[plan.rejected].tolist() == [1, 0]
    check(plan, 64)


def test_a_completion_that_is_the_start_of_another_costs_nothing():
    plan = plan_packs([ids(1, 2)], [ids(3, 4)], [ids(3, 4, 5, 6)], 64)
    (pack,) = plan.packs
    assert pack.ids.tolist() == [1, 2, 3, 4, 5]
    check(plan, 64)


def test_what_prompts_have_in_common_is_computed_once_a_pack():
    system, turn, answer = ids(*range(10, 40)), ids(40, 41, 42), ids(43, 44)
    prompts = [
        np.concatenate([system, turn]),
        np.concatenate([system, turn, answer, ids(45, 46)]),  # a later turn of that dialogue
        np.concatenate([system, ids(50, 51)]),
    ]
    completions = [ids(60 + i, 70 + i) for i in range(6)]
    plan = plan_packs(prompts, completions[:3], completions[3:], 1000)
    (pack,) = plan.packs
    # Of each completion one token is left out.
    assert pack.num_tokens == len(system) + len(turn) + len(answer) + 2 + 2 + 6
    check(plan, 1000)


def test_packs_end_where_the_least_is_cut():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1000, n).astype(np.int32) for n in rng.integers(5, 60, 200)]
    sides = [
        [rng.integers(0, 1000, n).astype(np.int32) for n in rng.integers(2, 40, 200)]
        for _ in range(2)
    ]
    plan = plan_packs(prompts, *sides, 512)
    filled = [pack.num_tokens / 512 for pack in plan.packs]
    assert np.mean(filled[:-1]) > 0.92
    # Sequences less their last tokens; of a pair the prompt once, whatever pack it is in.
    least = sum(len(x) for x in prompts) + sum(len(x) - 1 for side in sides for x in side)
    assert least * 0.99 < sum(pack.num_tokens for pack in plan.packs) <= least * 1.01


def test_a_pack_ends_early_only_where_that_saves_enough():
    # Three pairs of 10 + 2 + 2 tokens fit, and of a fourth the chosen side, if it is cut from the
    # other: then its prompt is computed twice. Left to the next pack it has 11 keys.
    prompts = [ids(*range(10 * i, 10 * i + 10)) for i in range(4)]
    sides = [[ids(50 + k, 60 + i) for i in range(4)] for k in range(2)]
    plan = plan_packs(prompts, *sides, 3 * 12 + 11)
    assert [len(pack.sequences) for pack in plan.packs] == [6, 2]
    # One token in common with the next prompt is not worth a pack that holds the first alone.
    prompts = [ids(*range(10)), *(ids(20, *range(10 * i, 10 * i + 9)) for i in range(3, 8))]
    sides = [[ids(80 + k, 90) for _ in prompts] for k in range(2)]
    plan = plan_packs(prompts, *sides, 3 * 12)
    assert max(pack.num_tokens for pack in plan.packs) > 2 * 12
    check(plan, 3 * 12)


def test_the_keys_of_a_pack_are_bounded_too():
    system = ids(*np.arange(300) % 50)
    pairs = [(ids(60, i), ids(70, i, 1)) for i in range(200)]
    sides = list(map(list, zip(*pairs, strict=True)))
    plan = plan_packs([system] * 200, *sides, 512, key_budget=4096)
    keys = [pack.num_keys for pack in plan.packs]
    assert max(keys) <= 4096 and np.mean(keys[:-1]) > 3500
    check(plan, 512)
    # Without that bound they fit one pack: what they do not share is a row a pair.
    assert len(plan_packs([system] * 200, *sides, 512).packs) == 1


def test_packs_are_laid_out_when_they_are_asked_for():
    plan = plan_packs([ids(1)] * 2, [ids(2, 3), ids(4, 5)], [ids(6, 7), ids(8, 9)], 2)
    first = next(plan.iter_packs())
    assert first.ids.tolist() == plan.packs[0].ids.tolist()
    assert len(list(plan.iter_packs())) == len(plan.packs) == 4


def test_key_index_gathers_prefix_then_own_rows():
    # Rows 0-4 are 1 2 3 4 5, row 5 is 7 after 1 2 3, row 6 is 9 after all of these; 7-8 are 9 9.
    sequences = [
        (ids(1, 2, 3), ids(4, 5, 6)),
        (ids(1, 2, 3), ids(7, 8)),
        (ids(1, 2, 3, 7), ids(9, 9)),
        (ids(9), ids(9, 1)),
    ]
    (pack,) = make_packs(sequences, range(4), 64)
    assert [s.prefix for s in pack.segments] == [(), ((0, 3),), ((0, 3), (5, 1)), ()]
    gather, cu_q, cu_k = key_index(pack.segments)
    assert gather.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 0, 1, 2, 5, 6, 7, 8]
    assert cu_q.tolist() == [0, 5, 6, 7, 9]
    assert cu_k.tolist() == [0, 5, 9, 14, 16]
    assert cu_q.dtype == cu_k.dtype == np.int32
