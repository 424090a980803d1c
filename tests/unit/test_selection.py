import json
import math
import pickle
import subprocess
import sys
from fractions import Fraction
from functools import reduce
from operator import add

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from refscale import schema
from refscale.errors import ConfigError, SelectionError
from refscale.selection import radix, strategies
from refscale.selection.order import (
    KEEPS,
    Cut,
    Decision,
    Group,
    Keys,
    SelectionSpec,
    keys_of,
    length_classes,
    sortable_bits,
    train_rows,
)
from refscale.selection.radix import RadixSelect, Tally, decide
from refscale.selection.statistics import Statistics
from refscale.selection.strategies import (
    STRATEGIES,
    Moments,
    moments_of,
    pair_id_words,
    score_columns,
    strategy_values,
)

SIDES = ("chosen", "rejected")


def random_keys(values, seed=0, sources=1):
    rng = np.random.default_rng(seed)
    n = len(values)
    ids = rng.integers(0, 2**64, (n, 2), dtype=np.uint64)
    names = np.array([f"s{i}" for i in rng.integers(0, sources, n)], dtype=object)
    differences = rng.integers(-9, 10, n) * rng.integers(0, 2, n)
    return Keys(np.asarray(values, np.float32), ids, names, differences)


def plain_keys(values, ids):
    """Keys of one source and sides of equal length."""
    n = len(values)
    return Keys(np.asarray(values, np.float32), ids, np.full(n, "s", object), np.zeros(n, np.int64))


def length_class(difference):
    """By hand: the bits of its absolute value, with its sign."""
    return abs(difference).bit_length() * (1 if difference > 0 else -1)


def split(keys, parts, seed):
    """The pairs of `keys`, shuffled and dealt out to `parts` shards, some of which are empty."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, len(keys) + 1, parts - 1))
    return [keys.take(rows) for rows in np.split(rng.permutation(len(keys)), cuts)]


def expected_ranks(spec, n):
    if spec.band:
        return [math.floor(q * n + 0.5) for q in spec.band]
    k = spec.count or max(1, math.floor(spec.fraction * n + 0.5))
    start = (n - k) // 2 if spec.keep == "middle" else 0
    return start, start + k


def parts_of(keys, spec):
    """Rows and ranks of what is cut on its own: sources, and of these the length classes."""
    for source in sorted(set(keys.sources)) if spec.per_source else [None]:
        rows = np.arange(len(keys)) if source is None else np.flatnonzero(keys.sources == source)
        if spec.threshold is not None:
            yield rows, None
            continue
        start, stop = expected_ranks(spec, len(rows))
        if not spec.match_lengths:
            yield rows, (start, stop)
            continue
        classes = np.array([length_class(d) for d in keys.length_differences[rows].tolist()], int)
        seen = 0
        for each in sorted(set(classes.tolist())):
            members = rows[classes == each]
            # A class ends where so many pairs of all that are kept have been dealt out.
            before, seen = seen, seen + len(members)
            ends = [Fraction(stop - start) * n / len(rows) + Fraction(1, 2) for n in (before, seen)]
            size = math.floor(ends[1]) - math.floor(ends[0])
            first = 0
            if spec.keep == "middle":
                first = (len(members) - size) // 2
            if spec.band:
                first = min(len(members) - size, math.floor(spec.band[0] * len(members) + 0.5))
            yield members, (first, first + size)


def oracle(keys, spec):
    """Kept pair ids by a plain sort of everything."""
    kept = set()
    for rows, ranks in parts_of(keys, spec):
        value = keys.values[rows] + np.float32(0)
        if spec.threshold is None:
            signed = -value if spec.keep == "largest" else value
            order = np.lexsort((keys.pair_ids[rows, 1], keys.pair_ids[rows, 0], signed))
            chosen = rows[order[slice(*ranks)]]
        elif spec.keep == "band":
            chosen = rows[(value >= spec.threshold[0]) & (value <= spec.threshold[1])]
        elif spec.keep == "largest":
            chosen = rows[value >= spec.threshold]
        else:
            chosen = rows[value <= spec.threshold]
        kept |= {tuple(ids) for ids in keys.pair_ids[chosen].tolist()}
    return kept


def selected(decision, shards):
    return {tuple(row) for keys in shards for row in keys.pair_ids[decision.mask(keys)].tolist()}


SPECS = [
    SelectionSpec(keep="largest", fraction=0.5),
    SelectionSpec(keep="smallest", fraction=0.3),
    SelectionSpec(keep="middle", fraction=0.4),
    SelectionSpec(keep="middle", count=4),
    SelectionSpec(keep="band", band=(0.25, 0.8)),
    SelectionSpec(keep="band", band=(0.0, 1.0)),
    SelectionSpec(keep="largest", count=3),
    SelectionSpec(keep="largest", fraction=1.0),
    SelectionSpec(keep="smallest", fraction=1e-9),
    SelectionSpec(keep="largest", threshold=0.0),
    SelectionSpec(keep="smallest", threshold=-0.25),
    SelectionSpec(keep="band", threshold=(-0.25, 1.0)),
    SelectionSpec(keep="largest", fraction=0.5, per_source=True),
    SelectionSpec(keep="smallest", count=1, per_source=True),
    SelectionSpec(keep="middle", fraction=0.5, per_source=True),
    SelectionSpec(keep="band", band=(0.1, 0.7), per_source=True),
    SelectionSpec(keep="largest", threshold=0.0, per_source=True),
    SelectionSpec(keep="largest", fraction=0.5, match_lengths=True),
    SelectionSpec(keep="smallest", count=5, match_lengths=True),
    SelectionSpec(keep="middle", fraction=0.4, match_lengths=True),
    SelectionSpec(keep="band", band=(0.3, 0.9), match_lengths=True),
    SelectionSpec(keep="largest", fraction=0.6, per_source=True, match_lengths=True),
]


def name_of(spec):
    size = next(
        n for n in ("fraction", "count", "threshold", "band") if getattr(spec, n) is not None
    )
    options = [name for name in ("per_source", "match_lengths") if getattr(spec, name)]
    return "-".join([spec.keep, size, *options])


SOME_VALUES = st.lists(
    st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.sampled_from([0.0, -0.0, 1.0, -0.25, 1e-45]),
    ),
    min_size=9,
    max_size=80,
)


@pytest.fixture(params=["gathered", "by digits"])
def few_gathered(request, monkeypatch):
    """Small cases end with a sort of all pairs; "by digits" makes them take every digit first."""
    if request.param == "by digits":
        monkeypatch.setattr(radix, "_GATHERED_PAIRS", 1)
        monkeypatch.setattr(radix, "_GATHERED_AT_LEAST", 1)


@pytest.mark.usefixtures("few_gathered")
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{name_of(s)}")
def test_selection_equals_a_sort_for_any_split(spec):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(values=SOME_VALUES, parts=st.integers(1, 7), seed=st.integers(0, 3))
    def check(values, parts, seed):
        keys = random_keys(values, seed, sources=3)
        expected = oracle(keys, spec)
        assume(expected)
        shards = split(keys, parts, seed)
        decision = decide(lambda: iter(shards), spec)
        assert selected(decision, shards) == expected
        assert decision.kept == len(expected)
        assert sum(group.pairs for group in decision.groups.values()) == len(keys)
        assert Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision

    check()


@pytest.mark.usefixtures("few_gathered")
@pytest.mark.parametrize("per_source", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_ninety_percent_ties_are_broken_by_pair_id_exactly(keep, per_source):
    rng = np.random.default_rng(1)
    values = np.where(rng.random(5000) < 0.9, 0.5, rng.standard_normal(5000))
    keys = random_keys(values, sources=4)
    size = {"band": (0.33, 0.7)} if keep == "band" else {"fraction": 0.37}
    spec = SelectionSpec(keep=keep, per_source=per_source, **size)
    shards = split(keys, 11, 0)
    found = selected(decide(lambda: iter(shards), spec), shards)
    assert found == oracle(keys, spec)
    if not per_source:
        assert len(found) == 1850  # 0.37 * 5000; 0.7 * 5000 - 0.33 * 5000


@pytest.mark.usefixtures("few_gathered")
def test_pair_ids_that_differ_in_their_last_bits_alone_are_told_apart():
    n = 300
    ids = np.full((n, 2), 2**64 - 1, np.uint64)
    ids[:, 1] = np.arange(n)[::-1]
    keys = plain_keys(np.ones(n), ids)
    kept = selected(decide(lambda: iter([keys]), SelectionSpec(count=7)), [keys])
    assert kept == {(2**64 - 1, i) for i in range(7)}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("keep", ["largest", "smallest", "middle"])
def test_every_strategy_selects_as_a_sort_does(strategy, keep):
    table = scores_table(400)
    spec = SelectionSpec(strategy=strategy, keep=keep, fraction=0.3, seed=5)
    shards = [table.slice(0, 150), table.slice(150, 1), table.slice(151)]
    fit = reduce(add, [moments_of(score_columns(shard)) for shard in shards]).fit()
    keys = [keys_of(shard, spec, fit) for shard in shards]
    decision = decide(lambda: iter(keys), spec, fit)
    whole = keys_of(table, spec, fit)
    assert selected(decision, keys) == oracle(whole, spec)
    again = decision.values(score_columns(table), whole.pair_ids)
    assert (again == whole.values).all()


def test_threshold_cut_is_the_last_kept_pair():
    ids = np.array([[0, 3], [0, 1], [0, 2], [0, 4]], np.uint64)
    keys = plain_keys([1, 1, 1, 2], ids)
    decision = decide(lambda: iter([keys]), SelectionSpec(count=3))
    # Largest first: id 4 (value 2), then ids 1, 2, 3 (value 1).
    interval = decision.groups[Group("all")]
    assert (interval.upper, interval.lower) == (Cut(1.0, f"{2:032x}"), None)
    assert (interval.pairs, interval.kept, interval.threshold) == (4, 3, 1.0)
    assert decision.mask(keys).tolist() == [False, True, True, True]


@pytest.mark.parametrize("per_source", [False, True])
def test_passes_may_be_tallied_apart_and_added_in_any_order(per_source):
    keys = random_keys(np.random.default_rng(3).standard_normal(3000), sources=3)
    spec = SelectionSpec(keep="middle", fraction=0.4, per_source=per_source)
    shards = split(keys, 9, 4)
    search, passes = RadixSelect(spec), 0
    while not search.done:
        # As tasks of a cluster do: the search travels, tallies come back in any order.
        tallies = [pickle.loads(pickle.dumps(search)).tally(shard) for shard in shards]
        random_order = np.random.default_rng(passes).permutation(len(tallies))
        left = reduce(add, [tallies[i] for i in random_order[:4]], Tally())
        search.advance(left + reduce(add, [tallies[i] for i in random_order[4:]]))
        passes += 1
    assert search.decision() == decide(lambda: iter([keys]), spec)
    assert passes == 2  # the first digit, then the few that share it


def test_memory_and_passes_do_not_grow_with_the_ties():
    ids = np.random.default_rng(0).integers(0, 2**64, (300_000, 2), dtype=np.uint64)
    keys = plain_keys(np.full(len(ids), 0.5), ids)
    search, passes = RadixSelect(SelectionSpec(fraction=0.5)), 0
    while not search.done:
        tally = search.tally(keys)
        assert len(pickle.dumps(tally)) < 32_000 + 24 * 1000
        search.advance(tally)
        passes += 1
    # 3 digits of the value, 1 of the pair_id (300,000 / 2048 = 146 pairs left), 1 to sort those.
    assert passes == 5
    assert search.decision().mask(keys).sum() == 150_000


def test_merge_law_top_k_of_parts_is_top_k_of_all():
    keys = random_keys(np.random.default_rng(2).standard_normal(1000))
    spec = SelectionSpec(count=100)

    def top(part):
        return part.take(decide(lambda: iter([part]), spec).mask(part))

    a, b = keys.take(slice(0, 600)), keys.take(slice(600, None))
    parts = [top(a), top(b)]
    joined = Keys(*(np.concatenate([getattr(p, n) for p in parts]) for n in Keys.__annotations__))
    assert selected(decide(lambda: iter([joined]), spec), [joined]) == oracle(keys, spec)


def test_sources_named_like_the_group_of_all_are_no_exception():
    keys = Keys(
        np.array([3, 2, 1, 0], np.float32),
        np.arange(8, dtype=np.uint64).reshape(4, 2),
        np.array(["all", "b", "all", "b"], object),
        np.zeros(4, np.int64),
    )
    kept = decide(lambda: iter([keys]), SelectionSpec(count=1, per_source=True)).mask(keys)
    assert kept.tolist() == [True, True, False, False]


def test_matched_lengths_keep_the_share_of_each_length_difference():
    rng = np.random.default_rng(7)
    n = 4000
    differences = rng.integers(-20, 21, n)
    # The key follows length: unmatched, the half with the longer chosen sides would be kept.
    values = differences + rng.standard_normal(n)
    ids = rng.integers(0, 2**64, (n, 2), dtype=np.uint64)
    keys = Keys(values.astype(np.float32), ids, np.full(n, "s", object), differences)
    spec = SelectionSpec(fraction=0.3, match_lengths=True)
    decision = decide(lambda: iter([keys]), spec)
    kept = decision.mask(keys)
    assert kept.sum() == decision.kept == 1200
    for each in range(-5, 6):  # 0, 1, 2 to 3, ... 16 to 31 tokens
        inside = length_classes(differences) == each
        assert abs(kept[inside].sum() - 0.3 * inside.sum()) < 1
        assert values[inside & kept].min() >= values[inside & ~kept].max()
    plain = decide(lambda: iter([keys]), SelectionSpec(fraction=0.3)).mask(keys)
    assert differences[plain].mean() > 12 > 3 > differences[kept].mean()


def test_a_decision_of_a_run_from_before_lengths_could_be_matched_is_read():
    spec = SelectionSpec(fraction=0.5, per_source=True)
    decision = decide(lambda: iter([random_keys(np.arange(20), sources=2)]), spec)
    stored = json.loads(json.dumps(decision.to_json()))
    del stored["spec"]["match_lengths"]
    for group in stored["groups"].values():
        del group["source"], group["length_class"]
    assert Decision.from_json(stored) == decision


def test_length_classes_double_and_groups_name_them():
    differences = np.array([0, 1, 2, 3, 4, 7, 8, -1, -2, -1024, 2**24 - 1])
    assert length_classes(differences).tolist() == [0, 1, 2, 2, 3, 3, 4, -1, -2, -11, 24]
    assert [
        Group(source, each).name
        for source, each in [("all", None), ("web", 0), ("web", 1), ("all", -3), ("all", 11)]
    ] == [
        "all",
        "web, of equal length",
        "web, chosen 1 token longer",
        "all, chosen 4 to 7 tokens shorter",
        "all, chosen 1,024 to 2,047 tokens longer",
    ]


def test_impossible_selections_are_refused_with_the_numbers():
    keys = random_keys([1.0, 2.0])
    with pytest.raises(SelectionError, match="count is 3, but there are only 2"):
        decide(lambda: iter([keys]), SelectionSpec(count=3))
    with pytest.raises(SelectionError, match=r"only 2 .* of source s0"):
        decide(lambda: iter([keys]), SelectionSpec(count=3, per_source=True))
    for per_source in (False, True):
        spec = SelectionSpec(fraction=0.5, per_source=per_source)
        with pytest.raises(SelectionError, match="no scored training pair"):
            decide(lambda: iter([]), spec)
        with pytest.raises(SelectionError, match="no scored training pair"):
            decide(lambda: iter([keys.take(slice(0))]), spec)
    with pytest.raises(SelectionError, match=r"threshold 9\.0 keeps none of 2 pairs"):
        decide(lambda: iter([keys]), SelectionSpec(threshold=9.0))
    with pytest.raises(SelectionError, match=r"band .* keeps none of 2 pairs"):
        decide(lambda: iter([keys]), SelectionSpec(keep="band", band=(0.3, 0.4)))


def test_non_finite_keys_are_refused_with_their_number_and_first_pair():
    keys = plain_keys([1, np.nan, np.inf], np.array([[0, 1], [0, 171], [0, 3]], np.uint64))
    with pytest.raises(SelectionError, match=f"2 values .* first of pair {171:032x}"):
        decide(lambda: iter([keys]), SelectionSpec(fraction=0.5))


@pytest.mark.usefixtures("few_gathered")
def test_a_pair_that_occurs_twice_at_the_cut_is_refused():
    ids = np.zeros((200, 2), np.uint64)
    keys = plain_keys(np.ones(200), ids)
    with pytest.raises(SelectionError, match=f"pair {0:032x} occurs 200 times"):
        decide(lambda: iter([keys]), SelectionSpec(fraction=0.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fraction": 10}, r"fraction must be in \(0, 1\], got 10"),
        ({"fraction": 0.0}, "fraction"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({}, "exactly one of fraction, count, threshold, band, got none"),
        ({"fraction": 0.5, "count": 3}, "got fraction and count"),
        ({"keep": "band", "fraction": 0.5}, "keep band does not go with fraction"),
        ({"band": (0.1, 0.2)}, "keep largest does not go with band"),
        ({"threshold": (0.1, 0.2)}, "keep largest does not go with threshold"),
        ({"keep": "band", "threshold": 0.1}, "keep band does not go with threshold"),
        ({"keep": "band", "band": (0.5, 0.5)}, "0 <= low < high <= 1"),
        ({"keep": "band", "threshold": (2.0, 1.0)}, "low <= high"),
        ({"keep": "middle", "threshold": 1.0}, "largest, smallest or band"),
        ({"threshold": 0.1, "match_lengths": True}, "match_lengths goes with fraction, count or"),
        ({"threshold": math.nan}, "finite"),
        ({"threshold": 1e39}, "finite float32"),
        ({"keep": "best", "fraction": 0.5}, "'best'"),
        ({"strategy": "margins", "fraction": 0.5}, "'margins'"),
        ({"fraction": 0.5, "beta": 0.0}, "beta must be above 0"),
    ],
)
def test_an_invalid_spec_is_named_in_one_line(fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        decide(lambda: iter([random_keys([1.0])]), SelectionSpec(**fields))
    assert "\n" not in str(caught.value)


def scores(n=500, seed=0):
    rng = np.random.default_rng(seed)
    columns = {f"num_{side}_tokens": rng.integers(1, 200, n).astype(np.int32) for side in SIDES}
    for side in SIDES:
        nats_per_token = rng.gamma(4, 0.25, n)  # mean 1, standard deviation 0.5
        logps = -nats_per_token * columns[f"num_{side}_tokens"]
        columns[f"ref_{side}_logps"] = logps.astype(np.float32)
    return columns


def scores_table(n=500, seed=0, split_name=schema.TRAIN):
    columns = scores(n, seed)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2**64, (n, 2), dtype=np.uint64)
    columns["pair_id"] = pa.array([row.astype(">u8").tobytes() for row in ids], pa.binary(16))
    columns["source"] = [f"s{i}" for i in rng.integers(0, 3, n)]
    columns["split"] = [split_name] * n
    columns["num_prompt_tokens"] = np.ones(n, np.int32)
    columns["chosen_truncated"] = columns["rejected_truncated"] = np.zeros(n, bool)
    return schema.conform(pa.table(columns), schema.SCORES, "scores")


def one(strategy, chosen=-6.0, rejected=-10.0, num_chosen=3, num_rejected=4, **options):
    columns = {
        "ref_chosen_logps": np.array([chosen], np.float32),
        "ref_rejected_logps": np.array([rejected], np.float32),
        "num_chosen_tokens": np.array([num_chosen], np.int32),
        "num_rejected_tokens": np.array([num_rejected], np.int32),
    }
    return float(strategy_values(columns, np.zeros((1, 2), np.uint64), strategy, **options)[0])


@pytest.mark.parametrize(
    ("strategy", "value"),
    [
        ("margin", 4.0),  # -6 - -10
        ("mean_margin", 0.5),  # -6/3 - -10/4 = -2 + 2.5
        ("ppl_gap", math.exp(2.0) - math.exp(2.5)),
        ("required_loss", math.log(1 + math.exp(0.1 * 4.0))),
        ("length_adjusted_margin", 4.0 - (1.0 + 2.0 * -1)),  # fit at 3 - 4 tokens
    ],
)
def test_strategy_values_by_hand(strategy, value):
    assert one(strategy, fit=(1.0, 2.0)) == pytest.approx(value, rel=1e-6)


def test_absolute_strategies_drop_the_sign():
    assert one("abs_margin", -10.0, -6.0) == 4.0
    assert one("abs_mean_margin", -10.0, -6.0, 4, 3) == 0.5


def test_required_loss_survives_large_margins():
    assert one("required_loss", 0.0, -1e5, beta=1.0) == pytest.approx(1e5)


def test_non_finite_value_names_the_pair():
    with pytest.raises(SelectionError, match="0000000000000000"):
        one("mean_margin", num_chosen=0, chosen=0.0)


def test_random_depends_on_seed_and_pair_alone():
    keys = random_keys(np.zeros(2000))
    first = strategy_values({}, keys.pair_ids, "random", seed=1)
    again = strategy_values({}, keys.pair_ids[::-1], "random", seed=1)[::-1]
    assert (first == again).all()
    assert (first != strategy_values({}, keys.pair_ids, "random", seed=2)).mean() > 0.99
    assert 0.45 < first.mean() < 0.55  # 2000 uniforms: standard error 0.0065


@settings(max_examples=50, deadline=None)
@given(
    y=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40),
    parts=st.integers(1, 9),
    seed=st.integers(0, 100),
)
def test_moments_are_exact_under_any_split(y, parts, seed):
    rng = np.random.default_rng(seed)
    y = np.array([*y, *rng.normal(0, 100, 30)], np.float32)
    x = rng.integers(-(2**24) + 1, 2**24, len(y))
    total = Moments()
    for rows in np.array_split(rng.permutation(len(x)), parts):
        total += Moments.of(x[rows], y[rows])
    xs, ys = [Fraction(v) for v in x.tolist()], [Fraction(v) for v in y.tolist()]
    assert total == Moments.of(x, y)
    assert (total.n, total.x, total.y) == (len(x), sum(xs), sum(ys))
    assert total.xx == sum(v * v for v in xs)
    assert total.xy == sum(a * b for a, b in zip(xs, ys, strict=True))
    assert total.yy == sum(v * v for v in ys)
    assert total.fit() == Moments.of(x, y).fit()


def test_long_columns_are_summed_exactly_in_pieces(monkeypatch):
    y = np.random.default_rng(0).normal(0, 1e6, 1000)
    monkeypatch.setattr(strategies, "_EXACT_ROWS", 64)
    assert strategies.exact_sum(y) == sum(map(Fraction, y.tolist()))


def test_fit_is_the_least_squares_line():
    columns = scores(5000)
    x = columns["num_chosen_tokens"].astype(np.int64) - columns["num_rejected_tokens"]
    y = columns["ref_chosen_logps"] - columns["ref_rejected_logps"]
    slope, intercept = np.polyfit(x.astype(float), y.astype(float), 1)
    assert Moments.of(x, y).fit() == pytest.approx((intercept, slope), rel=1e-9)
    assert Moments.of(np.array([2, 2]), np.array([1.0, 3.0])).fit() == (2.0, 0.0)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2))
def test_sortable_bits_order_as_the_floats_do(values):
    array = np.array(values, np.float32)
    bits = sortable_bits(array)
    assert ((array[:, None] < array) == (bits[:, None] < bits)).all()
    assert ((array[:, None] == array) == (bits[:, None] == bits)).all()


def test_pair_id_words_compare_like_the_bytes():
    raw = [bytes([i]) * 15 + bytes([255 - i]) for i in (7, 200, 3)]
    array = pa.chunked_array([pa.array(raw[:1], pa.binary(16)), pa.array(raw, pa.binary(16))[1:]])
    words = pair_id_words(array)
    order = np.lexsort((words[:, 1], words[:, 0]))
    assert [raw[i] for i in order] == sorted(raw)
    assert pair_id_words(array[:0]).shape == (0, 2)


def test_pair_id_words_of_one_chunk_are_a_view():
    array = pa.array([bytes([i]) * 16 for i in range(5)], pa.binary(16)).slice(2)
    words = pair_id_words(array)
    assert words.__array_interface__["data"][0] == array.buffers()[1].address + 2 * 16
    assert words.tolist()[0] == [0x0202020202020202] * 2


def test_only_the_training_split_is_selectable():
    table = pa.concat_tables([scores_table(5, 0), scores_table(4, 1, schema.HOLDOUT)])
    assert train_rows(table).equals(table.slice(0, 5))


def test_statistics_equal_numpy_and_ignore_the_split():
    table = scores_table(3000)
    spec = SelectionSpec(strategy="margin", fraction=0.3)
    shards = [table.slice(0, 1000), table.slice(1000, 1), table.slice(1001)]
    decision = decide(lambda: (keys_of(shard, spec) for shard in shards), spec)

    def statistics(shard):
        keys, columns = keys_of(shard, spec), score_columns(shard)
        return Statistics.of(keys, columns, decision.mask(keys), decision)

    found = reduce(add, map(statistics, shards[::-1])).to_json()
    assert json.dumps(found) == json.dumps(statistics(table).to_json())

    keys, columns = keys_of(table, spec), score_columns(table)
    kept = decision.mask(keys)
    difference = columns["num_chosen_tokens"].astype(int) - columns["num_rejected_tokens"]
    means = columns["ref_chosen_logps"].astype(float) / columns["num_chosen_tokens"]
    means -= columns["ref_rejected_logps"].astype(float) / columns["num_rejected_tokens"]
    assert (found["num_pairs"], found["num_kept"]) == (3000, 900)
    for name, rows in (("all", np.ones(3000, bool)), ("kept", kept)):
        part, key, length = found[name], keys.values[rows].astype(float), difference[rows]
        assert part["pairs"] == rows.sum()
        assert part["mean_key"] == pytest.approx(key.mean(), rel=1e-9)
        assert part["mean_abs_key"] == pytest.approx(np.abs(key).mean(), rel=1e-9)
        assert part["mean_length_difference"] == pytest.approx(length.mean(), rel=1e-9)
        assert part["mean_abs_length_difference"] == pytest.approx(np.abs(length).mean())
        assert part["key_length_correlation"] == pytest.approx(np.corrcoef(key, length)[0, 1])
        assert part["negative_margin_share"] == (key < 0).mean()
        assert part["negative_mean_margin_share"] == (means[rows] < 0).mean()
    for source, counts in found["sources"].items():
        rows = keys.sources == source
        assert counts == {"pairs": rows.sum(), "kept": (rows & kept).sum()}
    low, high = found["histogram"]["low"], found["histogram"]["high"]
    edges = np.linspace(low, high, 61)
    clipped = np.clip(keys.values.astype(float), low, high)
    # Random margins: none of 3,000 lies on an edge.
    assert found["histogram"]["all"] == np.histogram(clipped, edges)[0].tolist()
    assert found["histogram"]["kept"] == np.histogram(clipped[kept], edges)[0].tolist()
    assert ((keys.values < low) | (keys.values > high)).mean() < 0.002


def test_statistics_of_equal_keys_have_no_correlation():
    table = scores_table(20)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        position = table.schema.get_field_index(name)
        table = table.set_column(position, name, pa.array(np.zeros(20, np.float32)))
    spec = SelectionSpec(strategy="margin", fraction=0.5)
    keys, columns = keys_of(table, spec), score_columns(table)
    decision = decide(lambda: iter([keys]), spec)
    found = Statistics.of(keys, columns, decision.mask(keys), decision).to_json()
    assert found["all"]["key_length_correlation"] is None
    assert sum(found["histogram"]["all"]) == 20
    json.dumps(found, allow_nan=False)


def test_the_config_and_the_module_know_the_same_strategies_and_fields():
    from refscale.config import SelectConfig

    fields = SelectConfig.model_fields
    assert set(fields["strategy"].annotation.__args__) == set(STRATEGIES)
    assert set(fields["keep"].annotation.__args__) == set(KEEPS)
    assert set(fields) == set(SelectionSpec.__annotations__)
    SelectionSpec(**SelectConfig().model_dump()).validate()


def test_every_strategy_is_described_and_computable():
    columns, keys = scores(50), random_keys(np.zeros(50))
    for strategy, text in STRATEGIES.items():
        values = strategy_values(columns, keys.pair_ids, strategy)
        assert values.dtype == np.float32
        assert text


def test_selection_needs_neither_torch_nor_ray():
    code = (
        "import sys, refscale.config, refscale.schema, refscale.selection.order;"
        "import refscale.storage.store;"
        "sys.exit(' '.join({'torch', 'ray', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
