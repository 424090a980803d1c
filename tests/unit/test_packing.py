"""Packs, by replaying what each row of a pack sees and comparing with the plain sequences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refscale.scoring.packing import Pack, key_index, make_packs, plan_packs


def ids(*tokens):
    return np.array(tokens, dtype=np.int32)


def context(pack: Pack, row: int) -> list[int]:
    """The ids that a row sees, itself last."""
    (segment,) = (s for s in pack.segments if s.start <= row < s.start + s.length)
    prefix = pack.ids[segment.prefix_start : segment.prefix_start + segment.prefix_length]
    own = pack.ids[segment.start : row + 1]
    return [*prefix.tolist(), *own.tolist()]


def predictions(pack: Pack) -> list[list[tuple[tuple[int, ...], int]]]:
    """Of each sequence of a pack: (what is seen, what is predicted) for each of its terms."""
    of = [[] for _ in pack.sequences]
    for term, owner in zip(pack.terms.tolist(), pack.owners.tolist(), strict=True):
        seen = context(pack, int(pack.rows[term]))
        of[owner].append((tuple(seen), int(pack.targets[term])))
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
        starts = [s.start for s in pack.segments]
        assert starts == sorted(starts) and all(s.length for s in pack.segments)
        assert len(pack.rows) == len(pack.targets) and len(pack.terms) == len(pack.owners)
        seen = sum(len(context(pack, row)) for row in range(pack.num_tokens))
        assert pack.context == seen
        for row in range(pack.num_tokens):
            assert pack.positions[row] == len(context(pack, row)) - 1
        for number, found in zip(pack.sequences.tolist(), predictions(pack), strict=True):
            prompt, completion = plan.sequences[number]
            assert sorted(found) == expected(prompt, completion)
            assert plan.num_scored[number] == len(found)


token = st.integers(0, 3)  # few tokens, so that prefixes and whole sequences repeat
prompt_ids = st.lists(token, max_size=9).map(lambda x: ids(*x))
completion_ids = st.lists(token, min_size=1, max_size=9).map(lambda x: ids(*x))


@st.composite
def corpora(draw):
    """Pairs of which many share a prompt, and of these many a completion."""
    prompts = draw(st.lists(prompt_ids, min_size=1, max_size=4))
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
            assert sorted(found) == expected(*plan.sequences[number])


def test_a_pair_is_laid_out_with_its_prompt_and_common_prefix_once():
    plan = plan_packs([ids(1, 2, 3)], [ids(7, 8, 9)], [ids(7, 5)], 64)
    (pack,) = plan.packs
    # Shared 1 2 3 7, then 8 of the chosen leaf "8 9"; the rejected leaf "5" has nothing to hold.
    assert pack.ids.tolist() == [1, 2, 3, 7, 8]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4]
    # Row 2 predicts the common 7 for both, row 3 both 8 and 5, row 4 predicts 9.
    assert pack.rows.tolist() == [2, 3, 4, 3]
    assert pack.targets.tolist() == [7, 8, 9, 5]
    assert np.bincount(pack.owners).tolist() == [3, 2]
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


def test_packs_are_full_but_for_the_last():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1000, n).astype(np.int32) for n in rng.integers(5, 60, 200)]
    sides = [
        [rng.integers(0, 1000, n).astype(np.int32) for n in rng.integers(2, 40, 200)]
        for _ in range(2)
    ]
    plan = plan_packs(prompts, *sides, 512)
    filled = [pack.num_tokens / 512 for pack in plan.packs]
    assert np.mean(filled[:-1]) > 0.95


def test_packs_are_laid_out_when_they_are_asked_for():
    plan = plan_packs([ids(1)] * 2, [ids(2, 3), ids(4, 5)], [ids(6, 7), ids(8, 9)], 2)
    first = next(plan.iter_packs())
    assert first.ids.tolist() == plan.packs[0].ids.tolist()
    assert len(list(plan.iter_packs())) == len(plan.packs) == 4


def test_key_index_gathers_prefix_then_own_rows():
    # Shared rows 0-2, leaves 3-4 and 5; a second tree in rows 6-7.
    (pack,) = make_packs(
        [(ids(1, 2, 3), ids(4, 5, 6)), (ids(1, 2, 3), ids(7, 8)), (ids(9), ids(9, 1))], range(3), 64
    )
    gather, cu_q, cu_k = key_index(pack.segments)
    assert gather.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 6, 7]
    assert cu_q.tolist() == [0, 3, 5, 6, 7, 8]
    assert cu_k.tolist() == [0, 3, 8, 12, 13, 15]
    assert cu_q.dtype == cu_k.dtype == np.int32
