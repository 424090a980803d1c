"""Which training a run goes on with after its options changed."""

import json
from typing import Any

import pytest
from test_pipeline_stages import made, trained_with

from refscale import pipeline
from refscale.config import TrainConfig
from refscale.errors import FingerprintError
from refscale.storage.fingerprints import digest
from refscale.training.resumption import as_begun

__all__ = ["made", "trained_with"]  # fixtures, which pytest finds by their names here

CHECKPOINT = "training/checkpoints/dpo-0/checkpoint-00000100/rng_state.pth"


@pytest.fixture
def selected(made: Any) -> Any:
    """Makes runs whose training is next."""
    for stage in (pipeline.prepare, pipeline.score, pipeline.select):
        stage(made())
    return made


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the trainings that were started, all of which break off; Ray resumes by name."""
    names: list[str] = []

    def train(*_arguments: Any, name: str, **_options: Any) -> Any:
        names.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train_on_ray", train)
    return names


def begin(run: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(run)


def test_when_it_saves_may_change_and_a_training_goes_on(selected: Any, broken: list[str]) -> None:
    begin(selected(train={"save_steps": 100}))
    selected().store.write_bytes(CHECKPOINT, b"")
    begin(selected(train={"save_steps": 1000, "start_check_pairs": 2}))
    assert len(set(broken)) == 1
    assert selected().store.exists(CHECKPOINT)


@pytest.mark.parametrize("deciding", [False, True])
def test_a_training_of_an_earlier_refscale_goes_on_under_its_name(
    selected: Any, broken: list[str], deciding: bool
) -> None:
    """One whose fingerprint holds all that it held then."""
    begin(selected(train={"save_steps": 100}))
    run = selected()
    run.store.write_bytes(CHECKPOINT, b"")
    for stage in ("training", "policy"):
        stage_file = json.loads(run.store.read_bytes(f"{stage}/STAGE.json"))
        fingerprint = stage_file["fingerprint"]
        fingerprint["train"].update(save_steps=100, start_check_pairs=8, eval_steps=None)
        run.store.write_json(f"{stage}/STAGE.json", stage_file)
    if deciding:
        with pytest.raises(FingerprintError, match=r"train\.learning_rate = 1e-06, now it is 0.1"):
            pipeline.train(selected(train={"learning_rate": 0.1}))
        return
    begin(selected(train={"save_steps": 1000}))
    assert broken[1] == f"dpo-{digest(fingerprint)[:12]}" != broken[0]


def test_measuring_that_decides_nothing_may_change_with_its_pairs() -> None:
    def asked(**train: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        options = TrainConfig.model_validate(train).model_dump()
        deciding = pipeline.deciding_options(options)
        return {"train": deciding, "holdout_pairs": None}, options

    before = {"train": TrainConfig().model_dump() | {"eval_steps": 50}, "holdout_pairs": 9}
    assert as_begun(*asked(eval_steps=25), before)["holdout_pairs"] == 9
    assert as_begun(*asked(eval_steps=25), before)["train"]["eval_steps"] == 50
    best = asked(eval_steps=25, load_best_model_at_end=True)
    assert as_begun(*best, before)["train"]["eval_steps"] == 25
    assert as_begun(*best, before)["holdout_pairs"] is None
    assert as_begun(*best, None) == best[0]


def test_other_settings_begin_anew_where_there_is_nothing_to_lose(
    selected: Any, broken: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = {"per_device_train_batch_size": 4}
    begin(selected())
    store = selected().store
    store.write_json("training/FAILED.json", {})
    begin(selected(train=smaller))
    assert len(set(broken)) == 2 and not store.exists("training/FAILED.json")
    assert (
        "begins anew with train.per_device_train_batch_size = 4: with 8 it did"
        in capsys.readouterr().err
    )
    # Killed when only one folder was claimed.
    old, new = (json.loads(store.read_bytes(f"{s}/STAGE.json")) for s in ("training", "policy"))
    old["fingerprint"]["train"]["per_device_train_batch_size"] = 8
    store.write_json("training/STAGE.json", old)
    assert new["fingerprint"] != old["fingerprint"]
    begin(selected(train=smaller))
    assert broken[1] == broken[2]
    for kept in (CHECKPOINT, "policy/model.safetensors"):
        store.write_bytes(kept, b"")
        with pytest.raises(FingerprintError, match=r"per_device_train_batch_size = 4, now it is 8"):
            pipeline.train(selected())
        assert store.exists(kept)
        store.delete(kept)


def test_a_finished_training_is_never_begun_anew_by_itself(
    selected: Any, trained_with: list[Any]
) -> None:
    pipeline.train(selected())
    selected().store.delete("policy")  # as a comparison does
    with pytest.raises(FingerprintError, match=r"training/ .* was made with train\.seed"):
        pipeline.train(selected(train={"seed": 1}))
    assert len(trained_with) == 1
