"""What does the demo find, and how long does it take?

In: nothing, or the run folder of a demo that is done (`make demo` leaves demo/run). Out: a row for
each figure of its report: labels that are right in corpus, random half and kept half, holdout
before and after training with 95 % intervals, scoring speed, and a row for each stage's seconds.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import BenchmarkError, load_result, markdown_table, write_result

from refscale.cli import main as refscale
from refscale.demo import write_demo

Row = dict[str, Any]


def rows_of(report: Mapping[str, Any]) -> Iterator[Row]:
    """The figures of a report.json."""
    purity, holdout = report["evaluation"]["purity"], report["evaluation"]["overall"]
    for name in ("corpus", "random", "kept"):
        yield {"figure": f"right labels, {name}", **purity[name]}
    yield {"figure": "AUC of the key for a right label", "value": purity["auc"]}
    for name in ("reward_accuracy", "reward_margin", "ranking_accuracy"):
        for when in ("before", "after"):
            yield {"figure": f"{name} {when}", **holdout[name][when]}
    scoring = report["scoring"]
    yield {"figure": "scoring, pairs/s a replica", "value": scoring["pairs_per_s"]}
    yield {"figure": "scoring, useful tokens/s", "value": scoring["useful_tokens_per_s"]}
    for stage in report["stages"]:
        yield {"figure": f"seconds of {stage['command']}", "value": stage["seconds"]}


def main(argv: list[str]) -> int:
    """Run the demo if need be, write the result, print its table."""
    parser = argparse.ArgumentParser(prog="refscale bench demo", description=__doc__)
    parser.add_argument("--run-dir", help="a demo's run folder that is done")
    parser.add_argument("--out", help="file or folder of the result")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="refscale-demo-") as folder:
        run = Path(arguments.run_dir or f"{folder}/run")
        if arguments.run_dir is None:
            config = write_demo(Path(folder))
            code = refscale(["run", str(config), "--run-dir", str(run)])
            if code:
                return code
        if not (run / "report.json").is_file():
            raise BenchmarkError(f"{run} holds no report.json; run `make demo` first")
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    engine = report["scoring"]["engine"]
    path = write_result(
        "demo",
        config={"run": "make demo"},
        rows=list(rows_of(report)),
        data={
            "pairs": report["funnel"]["steps"][0]["count"],
            "kept": report["selection"]["num_kept"],
            "engine": {name: engine[name] for name in ("path", "dtype", "dtype_reason")},
        },
        out=arguments.out,
    )
    print(markdown_table(load_result(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
