"""The commands around a run: submit, plan, export, audit, compare, mtbench, bench.

cli.py registers them on its app. Each is a thin reading of arguments; the work is in the module of
its name, imported when the command runs, so that `refscale --help` answers at once.
"""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from refscale.config_file import load_config
from refscale.errors import ConfigError
from refscale.progress import say
from refscale.sizing.footprint import GPUS
from refscale.storage.store import Store

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The run's config.")]
RunDir = Annotated[
    str, typer.Option("--run-dir", help="The run folder: a path, or s3://, gs://, abfs://.")
]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="The run folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override; the value is YAML."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Judge = Annotated[
    str | None, typer.Option("--judge-url", help="An OpenAI-compatible endpoint, up to /v1.")
]
JudgeModel = Annotated[
    str | None, typer.Option("--judge-model", help="The judge's name at that endpoint.")
]
JudgeKey = Annotated[
    str | None,
    typer.Option("--judge-key-env", help="NAME of the environment variable with its key."),
]
JudgeExtra = Annotated[
    str | None,
    typer.Option(
        "--judge-extra",
        metavar="JSON",
        help="More fields of its requests; null takes one out, such as max_tokens.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    for command in (submit, plan, export, audit, compare, mtbench):
        app.command()(command)
    app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
    )(bench)


def submit(
    config: ConfigPath,
    run_dir: RunDir,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Of the dashboard: http://127.0.0.1:8265.")
    ] = None,
    stage: Annotated[str, typer.Option("--stage", help="One stage; default: all.")] = "run",
    restart: Annotated[
        bool, typer.Option("--restart", help="Redo the stage from nothing.")
    ] = False,
    submission_id: Annotated[
        str | None, typer.Option("--submission-id", help="Name of the job; default: Ray's.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job's log.")] = True,
    debug: Debug = False,
) -> int:
    """Run it as a Ray job on a cluster; ends with the job's exit code."""
    from refscale.cluster import submission

    return submission.submit(
        config,
        run_dir,
        overrides,
        address=address,
        stage=stage,
        restart=restart,
        submission_id=submission_id,
        wait=wait,
    )


def plan(
    config: ConfigPath,
    gpus: Annotated[
        str, typer.Option("--gpus", help=f"Number and name, e.g. 8xH100; of {', '.join(GPUS)}.")
    ] = "1xH100",
    price: Annotated[float | None, typer.Option("--price", help="Of a GPU hour.")] = None,
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="Take the lengths of this prepared run.")
    ] = None,
    pairs: Annotated[int | None, typer.Option("--pairs", help="Pairs of the corpus.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", metavar="P,C,R", help="Mean tokens; nothing is read then."),
    ] = None,
    scoring_mfu: Annotated[
        float | None,
        typer.Option("--scoring-mfu", help="Useful operations of scoring over the peak; 0.45."),
    ] = None,
    training_mfu: Annotated[
        float | None,
        typer.Option(
            "--training-mfu",
            help="A run's model_flops_per_s over the peak; default 0.35, less what the config pads"
            " and recomputes.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """What a run will take: tokens, GPU hours, memory, replicas, cost; needs no GPU."""
    from refscale.sizing import plan as sizing

    assumed = {"scoring_mfu": scoring_mfu, "training_mfu": training_mfu}
    result = sizing.size_run(
        config,
        overrides,
        gpus=gpus,
        price=price,
        run_dir=run_dir,
        num_pairs=pairs,
        lengths=lengths,
        **{name: value for name, value in assumed.items() if value is not None},
    )
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        lines = result.lines()
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            print(f"{name:<{width}}  {value}")


def export(
    run: RunPath,
    out: Annotated[str, typer.Option("--out", help="Folder or URI of the dataset.")],
    debug: Debug = False,
) -> None:
    """Write the selection as a dataset that TRL loads, with a dataset card."""
    from refscale.export import export_selection

    counts = export_selection(Store(run), out)["counts"]
    say(f"export    {counts['pairs']:,} pairs in {out}")


def audit(
    run: RunPath,
    limit: Annotated[int, typer.Option("--limit", help="Pairs that are listed.")] = 50,
    rows: Annotated[int, typer.Option("--rows", help="Of them shown here.")] = 20,
    flipped_column: Annotated[
        str | None,
        typer.Option(
            "--flipped-column",
            help="Column that is true or 1 where a label is wrong, null where nobody knows.",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="train or holdout alone.")] = None,
    debug: Debug = False,
) -> None:
    """List the pairs whose label the reference model doubts most; needs no GPU."""
    from refscale.experiments import audit as audits

    result = audits.audit(Store(run), limit, flipped_column=flipped_column, split=split)
    audits.print_audit(result, rows=rows)
    say(f"audit     all {result.pairs.num_rows:,} in {Store(run).uri}/audit/pairs.jsonl")


def compare(
    config: ConfigPath,
    run_dir: RunDir,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            help="full, random:0.5 or STRATEGY:KEEP:FRACTION[:matched]; again for more. Lengths are"
            " matched where it says so, whatever select.match_lengths is. Default: all, matched"
            " where select.match_lengths is true.",
        ),
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="Again for more; default 0, 1, 2.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", help="Arms at a time; default: what fits.")
    ] = None,
    keep_policies: Annotated[
        bool,
        typer.Option(
            "--keep-policies", help="Keep the policies of the arms that this command finishes."
        ),
    ] = False,
    judge_url: Judge = None,
    judge_model: JudgeModel = None,
    judge_key_env: JudgeKey = None,
    judge_extra: JudgeExtra = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Redo the arms and seeds of this command, and the reference's completions.",
        ),
    ] = False,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Train on several selections of one scored corpus and compare what comes out."""
    from refscale.evaluation.win_rate import win_rate
    from refscale.experiments import comparison
    from refscale.report import comparison_page

    extra = None
    if judge_url or judge_model or judge_key_env or judge_extra is not None:
        extra = win_rate(_judge(judge_url, judge_model, judge_key_env, judge_extra))
    result = comparison.compare(
        load_config(config, overrides),
        run_dir,
        arms,
        seeds=seeds or (0, 1, 2),
        parallel=parallel,
        keep_policies=keep_policies,
        restart=restart,
        extra=extra,
    )
    for line in [*comparison_page.lines(result), *result["notes"]]:
        say(line)
    say(f"compare   {Store(run_dir).uri}/comparison.html")


def mtbench(
    config: ConfigPath,
    run_dir: RunDir,
    judge_url: Annotated[str, typer.Option("--judge-url", help="An OpenAI-compatible endpoint.")],
    judge_model: Annotated[str, typer.Option("--judge-model", help="The judge's name there.")],
    judge_key_env: JudgeKey = None,
    judge_extra: JudgeExtra = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency")] = None,
    questions: Annotated[
        str | None, typer.Option("--questions", help="A question.jsonl; default: our small set.")
    ] = None,
    references: Annotated[
        str | None, typer.Option("--references", help="Reference answers, if in another file.")
    ] = None,
    judge_prompts: Annotated[
        str | None, typer.Option("--judge-prompts", help="A judge_prompts.jsonl; default: ours.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 1024,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 8,
    restart: Annotated[bool, typer.Option("--restart", help="Redo all answers.")] = False,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Rate reference and policy on two-turn questions by a judge, and compare them in pairs."""
    from refscale.evaluation import mtbench as bench_module

    result = bench_module.run_mtbench(
        load_config(config, overrides),
        run_dir,
        _judge(judge_url, judge_model, judge_key_env, judge_extra, concurrency=concurrency),
        questions=questions,
        references=references,
        judge_prompts=judge_prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        restart=restart,
    )
    print(json.dumps({key: result[key] for key in ("single", "pairwise", "usage")}, indent=2))


def _judge(
    url: str | None, model: str | None, key_env: str | None, extra: str | None, **more: Any
) -> Any:
    from refscale.evaluation.judge import judge_config, parse_extra

    if not url or not model:
        raise ConfigError("a judge needs both --judge-url and --judge-model")
    fields = None if extra is None else parse_extra(extra)
    return judge_config(base_url=url, model=model, api_key_env=key_env, extra=fields, **more)


def bench(context: typer.Context, question: Annotated[str, typer.Argument()] = "") -> int:
    """Answer a benchmark's question, such as scoring or selection; no name lists them."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    script = folder / f"bench_{question}.py"
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if question in ("", "-h", "--help"):
        print("usage: refscale bench NAME [OPTION ...]; refscale bench NAME --help shows them")
        for name, path in scripts.items():
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"  {name:<10} {doc.partition(chr(10))[0]}")
        if not scripts:
            print("  none here: they come with the repository, not with the package")
        return 0
    if not script.is_file():
        raise ConfigError(
            f"no benchmark {question!r}; known: {', '.join(scripts) or 'none here'}"
            " (they come with the repository, not with the package)"
        )
    sys.path.insert(0, str(folder))  # the scripts import each other
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None, "a file that exists has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    return int(module.main(context.args) or 0)
