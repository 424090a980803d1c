"""The selection benchmark: both sides keep the same pairs, and it ends with a result."""

import json

import bench_selection


def test_the_selection_benchmark_measures_both_sides_on_the_same_pairs(tmp_path, monkeypatch):
    monkeypatch.setenv("REFSCALE_COMMIT", "0" * 40)
    found = tmp_path / "result.json"
    assert bench_selection.main(["--sizes", "1000", "--out", str(found)]) == 0
    rows = json.loads(found.read_text())["rows"]
    assert [(row["ties"], row["kept"], row["equal"]) for row in rows] == [
        (0.0, 500, True),
        (0.9, 500, True),
    ]
    assert all(row["seconds"] > 0 and row["numpy_seconds"] > 0 for row in rows)
