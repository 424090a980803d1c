"""Two arms really trained side by side, judged, and not trained again."""

import pytest
from judge_server import JudgeServer
from support import string_pairs, write_jsonl

from refscale import pipeline
from refscale.config import parse_config
from refscale.errors import FingerprintError
from refscale.evaluation.win_rate import win_rate
from refscale.experiments.comparison import compare
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ARMS = ["full", "random:0.5"]


def test_arms_share_one_scoring_and_finished_ones_are_skipped(
    tmp_path, tiny_model, ray_session, monkeypatch
):
    rows = [{**row, "wrong": i % 3 == 0} for i, row in enumerate(string_pairs(40))]
    config = parse_config(
        {
            "model": {"model_name_or_path": str(tiny_model), "dtype": "float32"},
            "corpus": {
                "sources": [{"path": str(write_jsonl(tmp_path / "a.jsonl", rows))}],
                "holdout_fraction": 0.3,
            },
            "train": {"max_steps": 2, "per_device_train_batch_size": 4, "deepspeed": None},
            "evaluate": {"flipped_column": "wrong"},
        }
    )
    store = Store(tmp_path / "run")
    with JudgeServer(lambda number, request: "[[B]]") as server:
        extra = win_rate(server.config(), num_prompts=3, max_new_tokens=4)
        result = compare(config, store.uri, ARMS, seeds=[0], parallel=2, extra=extra)

    holdout = result["num_holdout"]
    assert set(result["arms"]) == set(ARMS) and holdout > 0
    full, random = (result["runs"][arm][0] for arm in ARMS)
    assert full["pairs"] == 40 - holdout and random["pairs"] == int((40 - holdout) / 2 + 0.5)
    assert 0 < full["right_labels"] < 1 and full["steps"] == 2
    for run in (full, random):
        # Always the second: the orders disagree wherever the completions differ.
        assert run["extra"]["against_reference"]["win_rate"] == 0.5
        assert run["extra"]["num_prompts"] == 3 and run["extra"]["mean_tokens"] <= 4
    assert store.exists("comparison.html") and store.exists("comparison.json")
    for arm in ("full", "random-0.5"):
        mine = Store(store.uri_of(f"arms/{arm}/seed-0"))
        assert not mine.exists("scores") and not mine.exists("corpus")
        assert not mine.exists("policy") and not mine.exists("training/checkpoints")
        assert StageFolder(mine, "compare").manifest() is not None

    def untouchable(run):
        raise AssertionError("a finished arm was trained again")

    monkeypatch.setattr(pipeline, "train", untouchable)
    monkeypatch.setattr(pipeline, "_score_shards", untouchable)
    again = compare(config, store.uri, ARMS, seeds=[0], parallel=2)
    assert again["arms"] == result["arms"] and again["runs"] == result["runs"]

    changed = config.model_copy(update={"train": config.train.model_copy(update={"beta": 0.5})})
    with pytest.raises(FingerprintError, match=r"train\.beta = 0\.1, now it is 0\.5"):
        compare(changed, store.uri, ARMS, seeds=[0], parallel=1)
