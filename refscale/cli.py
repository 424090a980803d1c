"""The command line: `refscale run | prepare | score | select | train | evaluate | report | …`.

Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 too much of the corpus refused, 130 stopped.
An error is one line on stderr; `--debug` shows the traceback. Results go to stdout, progress to
stderr.
"""

import json
import signal
import sys
import traceback
from typing import Annotated, Any

import typer
import typer.exceptions

from refscale import __version__, cli_tools
from refscale.cli_tools import ConfigPath, Debug, Overrides, RunDir, RunPath
from refscale.config import Config, dump_config
from refscale.config_file import load_config
from refscale.errors import ConfigError, RefscaleError
from refscale.progress import one_line, print_counts, say, visible
from refscale.secrets import refuse_secrets
from refscale.storage.locks import RunLock
from refscale.storage.store import Store

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Score preference pairs with the reference model, keep the clear ones, train on those.",
)
config_app = typer.Typer(no_args_is_help=True, help="Show the config or its JSON schema.")
app.add_typer(config_app, name="config")

Restart = Annotated[bool, typer.Option("--restart", help="Redo the stage from nothing.")]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminated)
    try:
        result = app(arguments, standalone_mode=False, prog_name="refscale")
        if result == 130:  # typer's answer to a KeyboardInterrupt
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except typer.exceptions.TyperException as exc:  # bad usage
        message = exc.format_message() if hasattr(exc, "format_message") else str(exc)
        if message:
            say(f"refscale: {message}")
        return int(getattr(exc, "exit_code", 2))
    except (typer.Abort, KeyboardInterrupt):
        say("refscale: stopped; what is finished is kept, the same command resumes")
        return 130
    except RefscaleError as exc:
        _show_traceback(arguments)
        say(f"refscale: {exc}")
        return exc.exit_code
    except Exception as exc:
        _show_traceback(arguments)
        say(
            f"refscale: unexpected {type(exc).__name__}: {str(exc).strip().splitlines()[-1:]};"
            " this is a defect of refscale, --debug shows where"
        )
        return 1


def _show_traceback(arguments: list[str]) -> None:
    if "--debug" in arguments:
        # The text of an exception may be a row's.
        print(visible(traceback.format_exc()), file=sys.stderr, end="")


def _terminated(_signal: int, _frame: Any) -> None:
    # Ray and the lock are released on the way out, as after Ctrl-C.
    raise KeyboardInterrupt


def _work(
    config: str, run_dir: str, overrides: list[str] | None, stages: tuple[str, ...], restart: bool
) -> None:
    loaded = load_config(config, overrides)
    # The resolved config goes into the run folder and the report.
    refuse_secrets(loaded, run_dir)
    # Ray and torch take seconds to import: a wrong config is answered before.
    from refscale.pipeline import run_stages
    from refscale.run import Run

    store = Store(run_dir)
    with RunLock(store):
        run = Run(store, loaded, restart=frozenset(stages) if restart else frozenset())
        run_stages(run, stages)


@app.command("run")
def run_command(
    config: ConfigPath,
    run_dir: RunDir,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """All stages; skips what is done, resumes what was begun."""
    from refscale.pipeline import STAGES

    _work(config, run_dir, overrides, STAGES, restart=False)


def _add_stage(name: str, doc: str) -> None:
    def command(
        config: ConfigPath,
        run_dir: RunDir,
        overrides: Overrides = None,
        restart: Restart = False,
        debug: Debug = False,
    ) -> None:
        _work(config, run_dir, overrides, (name,), restart)

    app.command(name, help=doc)(command)


for _name, _doc in (
    ("prepare", "Read, validate, encode and de-duplicate the corpus."),
    ("score", "Compute the reference model's log-probs of every pair."),
    ("select", "Keep the clearest pairs; needs no GPU."),
    ("train", "DPO on the selection with the stored scores."),
    ("evaluate", "Score the holdout with the policy."),
    ("report", "Write report.html and report.json."),
):
    _add_stage(_name, _doc)


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Check config and corpus without Ray or a GPU; print the funnel and every refusal."""
    loaded = load_config(config, overrides)
    from refscale.corpus.preparation import validate_sources
    from refscale.training.checks import check_training

    check_training(loaded)
    funnel = validate_sources(loaded)
    for refusal in funnel.refusals:
        print(one_line(str(refusal)))
    for line in funnel.sources:
        say(line)
    print_counts("corpus", funnel.counts.as_funnel())
    funnel.counts.check()
    funnel.check_refused(loaded.corpus.max_bad_fraction)


@app.command()
def status(run_dir: RunPath, debug: Debug = False) -> None:
    """What is done, what is next, and how fast it went."""
    from refscale.cli_status import status_lines

    store = Store(run_dir)
    if not store.exists("config.yaml"):
        raise ConfigError(f"{store.uri} is not a run folder: it has no config.yaml")
    for line in status_lines(store):
        print(one_line(line))


@config_app.command("schema")
def config_schema() -> None:
    """The config's JSON schema, for editors."""
    print(json.dumps(Config.model_json_schema(), indent=2))


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None, debug: Debug = False) -> None:
    """The resolved config, every default written out."""
    print(dump_config(load_config(config, overrides)), end="")


cli_tools.register(app)


@app.command()
def version() -> None:
    """The version of refscale."""
    print(__version__)


if __name__ == "__main__":
    sys.exit(main())
