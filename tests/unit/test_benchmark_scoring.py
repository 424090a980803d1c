"""The scoring benchmark: what it says of a peer is what that peer did."""

import json

import bench_scoring
import pytest


def test_every_scorer_agrees_and_its_padding_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("REFSCALE_COMMIT", "0" * 40)
    found = tmp_path / "result.json"
    asked = "--model tiny-shape --dtype float32 --corpora hh-like --pairs 6 --repeats 2"
    asked += f" --oracle-pairs 6 --scorers TRL,refscale --out {found}"
    assert bench_scoring.main(asked.split()) == 0
    rows = {row["scorer"]: row for row in json.loads(found.read_text())["rows"]}
    scorers = [name for name in rows if name != "matrix products"]
    assert scorers == ["TRL precompute", "refscale padded", "refscale packed"]
    assert all(rows[name]["largest_error_nats"] < 1e-3 for name in scorers)
    assert all(rows[name]["times_trl"]["median"] > 0 for name in scorers)

    pairs = bench_scoring.corpora.make("hh-like", 6, 512)
    prompts, chosen, rejected = (
        [len(ids) for ids in side]
        for side in (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)
    )
    useful = sum(prompts) + sum(chosen) + sum(rejected)
    # TRL: one batch, 12 rows of the longest. Packs: no padding, and no last tokens.
    longest = max(p + c for side in (chosen, rejected) for p, c in zip(prompts, side, strict=True))
    assert rows["TRL precompute"]["computed_tokens"] == pytest.approx(12 * longest / useful)
    assert rows["refscale packed"]["computed_tokens"] == pytest.approx((useful - 12) / useful)
