"""The corpora of the benchmarks that are split from a file."""

import json

import corpora
import pytest


def write(path, prompts):
    rows = [{**row, "chosen": f"c{i}", "rejected": f"r{i}"} for i, row in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("without", [{}, {"prompt": ""}, {"prompt": None}, {"prompt": []}])
def test_rows_without_a_prompt_are_split_one_by_one(tmp_path, without):
    # In one group, all 12 would be held out, and none left to train on.
    train, holdout = corpora.from_file(write(tmp_path / "pairs.jsonl", [without] * 12), 100, 4)
    assert (len(train), len(holdout)) == (8, 4)


def test_rows_of_a_prompt_stay_on_one_side(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": f"p{i // 3}"} for i in range(12)])
    train, holdout = corpora.from_file(path, 100, 4)
    # Whole prompts, of 3 pairs each: 2 for at least 4 pairs.
    assert (len(train), len(holdout)) == (6, 6)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in holdout}
