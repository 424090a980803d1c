"""What a run without a terminal prints."""

import io
import re

import pytest
from rich.console import Console

from refscale import progress


@pytest.fixture
def printed(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, width=200))
    return stream


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_plain_line_every_few_seconds_and_one_at_the_end(printed, clock):
    with progress.StageProgress("score", 100, "pairs") as stage:
        for _ in range(10):
            clock[0] += 2
            stage.advance(10)
    lines = printed.getvalue().splitlines()
    # At 2, 8, 14 s (PLAIN_EVERY_S = 5), and at the end.
    assert [line.split()[1] for line in lines] == ["10", "40", "70", "100"]
    assert lines[1] == "score     40 of 100 pairs, 5.0/s, 12 s left"
    assert "left" not in lines[-1]


def test_what_an_earlier_run_did_is_not_part_of_the_rate(printed, clock):
    with progress.StageProgress("score", 1000, "pairs", done=900) as stage:
        clock[0] += 10
        stage.advance(20)
    assert printed.getvalue() == "score     920 of 1,000 pairs, 2.0/s, 40 s left\n"


def test_markup_in_a_message_is_printed_as_it_is(printed):
    progress.say("[red]a corpus[/red] said this")
    assert printed.getvalue() == "[red]a corpus[/red] said this\n"


# Clears the screen, sets the window's title, rings, goes back, C1's CSI, turns the order.
HOSTILE = "\x1b[2J\x1b]0;mine\x07\x08\r\x9b1m\u202e"
SHOWN = r"\x1b[2J\x1b]0;mine\x07\x08\r\x9b1m\u202e"


def test_controls_are_spelled_out_and_lines_and_tabs_kept():
    assert progress.visible(f"a{HOSTILE}b\n\tc\r\nd") == f"a{SHOWN}b\n\tc\nd"
    assert progress.one_line(f"a{HOSTILE}\nb\tc") == f"a{SHOWN}\\nb\tc"


def test_a_message_cannot_drive_the_terminal(printed):
    progress.say(f"a row: {HOSTILE}\nand :warning: [b]more[/b]")
    assert printed.getvalue() == f"a row: {SHOWN}\nand :warning: [b]more[/b]\n"


@pytest.mark.parametrize("name", ["hh [clean]", "a[/b]", "[red]x[/red]", ":warning:", "back\\[x]"])
def test_cells_and_title_of_a_table_are_no_markup(printed, name):
    progress.print_table(name, [(name, f"{name} kept"), ("next", "row")])
    lines = printed.getvalue().splitlines()
    assert lines[0].strip() == name
    assert lines[1].rstrip() == f"{name}  {name} kept"
    assert lines[2].split() == ["next", "row"]


def test_controls_in_a_table_are_spelled_out(printed):
    progress.print_table("selection", [(HOSTILE, HOSTILE)])
    assert printed.getvalue().splitlines()[1].split() == [SHOWN, SHOWN]


def test_on_a_terminal_the_only_controls_are_our_own(monkeypatch):
    stream = io.StringIO()
    on_terminal = Console(file=stream, width=200, force_terminal=True, color_system="standard")
    monkeypatch.setattr(progress, "console", on_terminal)
    progress.print_table("title", [("name", f"{HOSTILE}[red]x[/red]")])
    styles = re.findall(r"\x1b\[(\d*)m", stream.getvalue())
    assert set(styles) == {"3", "2", "0"}  # the title is italic, names are dim
    assert stream.getvalue().count("\x1b") == len(styles)
    assert f"{SHOWN}[red]x[/red]" in stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_line_of_a_stage_is_one_line_without_controls_or_markup(monkeypatch, clock, terminal):
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=terminal, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    with progress.StageProgress("prepare", 4, "rows") as stage:
        stage.advance(4, f"{HOSTILE}\n[/b]:warning:")
    assert f"4 of 4 rows, 4,000,000,000.0/s, {SHOWN}\\n[/b]:warning:" in stream.getvalue()
    assert not set("\x07\x08\x9b\u202e") & set(stream.getvalue())
    assert "\x1b]" not in stream.getvalue() and "\x1b[2J" not in stream.getvalue()
