import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refscale.errors import SelectionError
from refscale.selection import (
    STRATEGIES,
    Decision,
    Keys,
    Moments,
    SelectionSpec,
    decide,
    pair_id_words,
    sortable_bits,
    strategy_values,
)


def keys_of(values, seed=0, sources=1):
    rng = np.random.default_rng(seed)
    n = len(values)
    ids = rng.integers(0, 2**64, (n, 2), dtype=np.uint64)
    names = np.array([f"s{i}" for i in rng.integers(0, sources, n)], dtype=object)
    return Keys(np.asarray(values, np.float32), ids, names)


def split(keys, parts, seed):
    """The pairs of `keys`, shuffled and dealt out to `parts` shards."""
    order = np.random.default_rng(seed).permutation(len(keys))
    return [
        Keys(keys.values[rows], keys.pair_ids[rows], keys.sources[rows])
        for rows in np.array_split(order, parts)
    ]


def oracle(keys, spec):
    """Kept pair ids by a plain sort of everything."""
    kept = set()
    groups = np.unique(keys.sources).tolist() if spec.per_source else ["all"]
    for group in groups:
        rows = np.flatnonzero(keys.sources == group) if spec.per_source else np.arange(len(keys))
        value = keys.values[rows] + np.float32(0)
        order = np.lexsort(
            (keys.pair_ids[rows, 1], keys.pair_ids[rows, 0], -value if spec.descending else value)
        )
        if spec.threshold is not None:
            limit = np.float32(spec.threshold)
            inside = value >= limit if spec.descending else value <= limit
            chosen = rows[inside]
        else:
            start, stop = spec.ranks(len(rows), group)
            chosen = rows[order[start:stop]]
        kept |= {tuple(keys.pair_ids[row].tolist()) for row in chosen}
    return kept


def selected(decision, shards):
    return {tuple(row) for keys in shards for row in keys.pair_ids[decision.mask(keys)].tolist()}


SPECS = [
    SelectionSpec(keep="largest", fraction=0.5),
    SelectionSpec(keep="smallest", fraction=0.3),
    SelectionSpec(keep="middle", fraction=0.4),
    SelectionSpec(keep="band", band=(0.25, 0.8)),
    SelectionSpec(keep="largest", count=3),
    SelectionSpec(keep="largest", fraction=1.0),
    SelectionSpec(keep="largest", threshold=0.0),
    SelectionSpec(keep="smallest", threshold=-0.25),
    SelectionSpec(keep="largest", fraction=0.5, per_source=True),
    SelectionSpec(keep="middle", fraction=0.5, per_source=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.keep}-{s.per_source}-{s.threshold}")
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.one_of(
            st.floats(-(2.0**99), 2.0**99, width=32),
            st.sampled_from([0.0, -0.0, 1.0, -0.25, 1e-45]),
        ),
        min_size=9,
        max_size=80,
    ),
    parts=st.integers(1, 7),
    seed=st.integers(0, 3),
)
def test_selection_equals_a_sort_for_any_split(spec, values, parts, seed):
    sources = 1 if spec.count else 3
    keys = keys_of(values, seed, sources)
    shards = split(keys, parts, seed)
    decision = decide(lambda: iter(shards), spec)
    assert selected(decision, shards) == oracle(keys, spec)
    assert decision.kept == len(oracle(keys, spec))
    assert Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision


@pytest.mark.parametrize("keep", ["largest", "smallest", "middle"])
def test_ties_are_broken_by_pair_id_exactly(keep):
    rng = np.random.default_rng(1)
    keys = keys_of(np.where(rng.random(5000) < 0.9, 0.5, rng.standard_normal(5000)))
    spec = SelectionSpec(keep=keep, fraction=0.37)
    shards = split(keys, 11, 0)
    found = selected(decide(lambda: iter(shards), spec), shards)
    assert found == oracle(keys, spec)
    assert len(found) == 1850  # floor(0.37 * 5000 + 0.5)


def test_all_keys_equal_keeps_the_smallest_pair_ids():
    keys = keys_of(np.zeros(100))
    kept = selected(decide(lambda: iter([keys]), SelectionSpec(count=10)), [keys])
    assert kept == set(sorted(tuple(row) for row in keys.pair_ids.tolist())[:10])


def test_merge_law_top_k_of_parts_is_top_k_of_all():
    keys = keys_of(np.random.default_rng(2).standard_normal(1000))
    spec = SelectionSpec(count=100)

    def top(part):
        mask = decide(lambda: iter([part]), spec).mask(part)
        return Keys(part.values[mask], part.pair_ids[mask], part.sources[mask])

    a, b = split(keys, 2, 0)
    parts = [top(a), top(b)]
    joined = Keys(*(np.concatenate([getattr(p, n) for p in parts]) for n in Keys.__annotations__))
    assert selected(decide(lambda: iter([joined]), spec), [joined]) == oracle(keys, spec)


def test_more_pairs_than_there_are_is_refused():
    keys = keys_of([1.0, 2.0])
    with pytest.raises(SelectionError, match="count is 3, but there are only 2"):
        decide(lambda: iter([keys]), SelectionSpec(count=3))
    with pytest.raises(SelectionError, match="no scored training pair"):
        decide(lambda: iter([]), SelectionSpec(fraction=0.5))


def scores(n=500, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "ref_chosen_logps": rng.normal(-100, 50, n).astype(np.float32),
        "ref_rejected_logps": rng.normal(-100, 50, n).astype(np.float32),
        "num_chosen_tokens": rng.integers(1, 200, n).astype(np.int32),
        "num_rejected_tokens": rng.integers(1, 200, n).astype(np.int32),
    }


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
    keys = keys_of(np.zeros(2000))
    first = strategy_values({}, keys.pair_ids, "random", seed=1)
    again = strategy_values({}, keys.pair_ids[::-1], "random", seed=1)[::-1]
    assert (first == again).all()
    assert (first != strategy_values({}, keys.pair_ids, "random", seed=2)).mean() > 0.99
    assert 0.45 < first.mean() < 0.55  # 2000 uniforms: standard error 0.0065


@settings(max_examples=50, deadline=None)
@given(parts=st.integers(1, 9), seed=st.integers(0, 100))
def test_moments_are_exact_under_any_split(parts, seed):
    columns = scores(seed=seed)
    x = columns["num_chosen_tokens"].astype(np.int64) - columns["num_rejected_tokens"]
    y = columns["ref_chosen_logps"] - columns["ref_rejected_logps"]
    whole = Moments.of(x, y)
    order = np.random.default_rng(seed).permutation(len(x))
    total = Moments()
    for rows in np.array_split(order, parts):
        total += Moments.of(x[rows], y[rows])
    assert total == whole
    assert whole.y == sum((Fraction(float(v)) for v in y), Fraction(0))


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


def test_every_strategy_is_described_and_computable():
    columns, keys = scores(50), keys_of(np.zeros(50))
    for strategy, text in STRATEGIES.items():
        values = strategy_values(columns, keys.pair_ids, strategy)
        assert values.dtype == np.float32
        assert text


def test_selection_needs_neither_torch_nor_ray():
    code = (
        "import sys, refscale.config, refscale.schema, refscale.selection, refscale.storage;"
        "sys.exit(' '.join({'torch', 'ray', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
