"""What a run without a terminal prints."""

import io

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
