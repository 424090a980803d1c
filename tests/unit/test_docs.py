"""The documentation: links resolve, commands are real, generated pages are current."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from refscale import schema
from refscale.cli import app
from refscale.config import parse_config

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [*PAGES, *(p for p in (ROOT / "README.md", ROOT / "SECURITY.md") if p.exists())]
# typer carries a click of its own, whose errors it exports in part.
UsageError = typer.BadParameter.__base__
# A command line that ends so is not parsed here.
NEEDS_CLUSTER = "# needs a cluster"


def parse_command(line: str) -> None:
    """Parse `COMMAND ARGUMENTS` of refscale with the real command line, without running it.

    Raises:
        UsageError: There is no such command, option or argument.
    """
    group = typer.main.get_command(app)
    arguments = shlex.split(line, comments=True)
    context = group.make_context("refscale", list(arguments), resilient_parsing=False)
    while hasattr(group, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = group.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
        group = command


def commands(path: Path) -> list[str]:
    """Every `refscale …` or `python -m refscale.cli …` command in a page's code blocks."""
    text = path.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    blocks = [block for language, block in fenced if language in ("", "bash", "sh", "console")]
    blocks += re.findall(r"(?:^    .*\n)+", text, re.M)
    found = []
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            match = re.search(r"(?:^|\s)(?:\S*/)?(?:refscale|-m refscale\.cli) (.*)$", line)
            if match and NEEDS_CLUSTER not in line and "install" not in line:
                found.append(match.group(1))
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_every_command_shown_parses_with_the_real_command_line(path):
    for line in commands(path):
        try:
            parse_command(line)
        except UsageError as exc:
            raise AssertionError(f"{path.name}: refscale {line}: {exc.format_message()}") from exc


def test_commands_are_found_and_wrong_ones_are_refused():
    assert len(commands(DOCS / "tutorial.md")) > 10
    assert any(line.startswith("submit ") for line in commands(DOCS / "cluster.md"))
    for line in ("scor config.yaml --run-dir x", "run config.yaml", "run config.yaml --rundir x"):
        with pytest.raises(UsageError):
            parse_command(line)


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_every_internal_link_resolves(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            slugs = {
                re.sub(r"[^\w]+", "-", h.lower().replace("`", "")).strip("-") for h in headings
            }
            assert anchor in slugs, f"{path.name} links to {target}"


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": (\w+\.md)$", text, re.M))
    assert named == {path.name for path in PAGES}


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_every_config_shown_is_valid(path):
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S):
        values = yaml.safe_load(block)
        values.setdefault("model", {"model_name_or_path": "model"})
        values.setdefault("corpus", {"sources": [{"path": "pairs.jsonl"}]})
        parse_config(values, f"a config in {path.name}")


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generator", DOCS / "generate_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_and_the_reasons_are_current(generator):
    for name in ("configuration.md", "reasons.md", "performance.md"):
        page = generator.PAGES[name]()
        committed = (DOCS / name).read_text(encoding="utf-8")
        assert committed == page, f"{name} is out of date: python docs/generate_reference.py"


def test_the_performance_page_shows_what_a_result_file_holds_and_nothing_else(generator, tmp_path):
    assert "0 result file(s)" in generator.performance(tmp_path)
    result = {
        "question": "scoring",
        "commit": "ab" * 20,
        "dirty": False,
        "time": "2026-01-02T03:04:05+00:00",
        "hardware": {"cpu": "a CPU", "cores": 2, "gpus": []},
        "versions": {"torch": "9.9"},
        "units": {"seconds": "s"},
        "columns": ["scorer", "seconds"],
        "rows": [{"scorer": "ours", "seconds": 12.5}],
        "not_measured": ["GPUs"],
        "notes": [],
    }
    (tmp_path / "scoring.json").write_text(json.dumps(result))
    page = generator.performance(tmp_path)
    assert "| ours | 12.5 |" in page and "Not measured: GPUs" in page and "abababababab" in page


def test_every_column_of_every_table_is_described():
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    for table in ("corpus", "quarantine", "scores", "selection", "evaluation"):
        [section] = re.findall(rf"^\*\*{table}/\*\*.*?(?=^\*\*|\Z)", text, re.M | re.S)
        shown = set(re.findall(r"`(\w+)`", section))
        missing = set(getattr(schema, table.upper()).names) - shown
        assert not missing, f"{table}/ in formats.md lacks {', '.join(sorted(missing))}"


def test_exit_codes_are_those_of_the_errors():
    from refscale import errors

    text = (DOCS / "failures.md").read_text(encoding="utf-8")
    shown = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    used = {
        value.exit_code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.RefscaleError)
    }
    assert used | {0, 130} == shown
