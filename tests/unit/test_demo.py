"""The demo's corpus: real docstrings, planted flips, a clean holdout on other functions."""

import subprocess
import sys

import pytest

from refscale.demo import docstring_functions, make_corpus


def text(row, side):
    return row[side][0]["content"]


def test_flips_are_recorded_and_only_in_the_training_rows():
    own = {signature: doc for signature, doc in docstring_functions()}
    train, holdout = make_corpus(200, 50)
    for row in train + holdout:
        signature = row["prompt"][0]["content"].split("`")[1]
        right = "rejected" if row["label_flipped"] else "chosen"
        assert text(row, right) == own[signature]
        assert text(row, "chosen") != text(row, "rejected")
    flipped = sum(row["label_flipped"] for row in train)
    assert 40 <= flipped <= 80  # 200 draws at 0.3: 60, standard deviation 6.5
    assert not any(row["label_flipped"] for row in holdout)


def test_no_text_of_the_holdout_is_in_the_training_rows():
    train, holdout = make_corpus(200, 50)
    seen = {text(row, side) for row in train for side in ("chosen", "rejected")}
    assert not seen & {text(row, side) for row in holdout for side in ("chosen", "rejected")}


def test_the_same_seed_gives_the_same_corpus_and_another_one_does_not():
    assert make_corpus(50, 10, seed=3) == make_corpus(50, 10, seed=3)
    assert make_corpus(50, 10, seed=3) != make_corpus(50, 10, seed=4)


def test_two_processes_make_the_same_corpus():
    code = (
        "import hashlib; from refscale.demo import make_corpus;"
        " print(hashlib.sha256(repr(make_corpus(240, 60)).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_more_pairs_than_documented_functions_are_refused():
    with pytest.raises(ValueError, match="documented functions"):
        make_corpus(100_000, 10)
