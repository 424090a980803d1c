"""What a run says while it works: a live line on a terminal, a plain line every few seconds else.

`ray job submit` and CI have no terminal: there one line every PLAIN_EVERY_S seconds is all that is
printed. Everything goes to stderr, so that stdout stays free for results.

What is said may hold text of the corpus, which is hostile: no control reaches the terminal, and
nothing in it is markup.
"""

import re
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 5.0

console = Console(stderr=True, highlight=False, soft_wrap=True)

# Controls but tab and newline, and the marks that let text be shown in another order than it has.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Text with the controls that a terminal or browser would obey or swallow spelled out."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """`visible`, with newlines spelled out too: a row cannot write a line of its own."""
    return visible(text).replace("\n", "\\n")


def literal(text: str, style: str = "") -> Text:
    """`visible` for rich, which takes a bare string for markup and `:name:` for an emoji."""
    return Text(visible(text), style)


def say(message: str) -> None:
    """A message to stderr, `literal`."""
    console.print(literal(message))


class StageProgress:
    """Progress of one stage; use as a context manager.

    Args:
        stage: Name shown first.
        total: Units of work, or None where it is not known.
        unit: What is counted, for example "pairs".
        done: Units that an earlier run of the stage has done; not part of the rate.
    """

    def __init__(self, stage: str, total: int | None, unit: str, *, done: int = 0) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._before = self._done = done
        self._started, self._printed = time.monotonic(), 0.0
        self._live: Progress | None = None
        if console.is_terminal:
            self._live = Progress(
                TextColumn("{task.fields[stage]:<9}", markup=False),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[line]}", markup=False),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._live.add_task("", total=total, stage=stage, line="starting")

    def __enter__(self) -> "StageProgress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._live:
            self._live.stop()

    def advance(self, count: int, extra: str = "") -> None:
        """`count` more units are done; `extra` is appended to the line."""
        self._done += count
        now = time.monotonic()
        rate = (self._done - self._before) / max(now - self._started, 1e-9)
        line = f"{self._done:,}"
        if self._total:
            line += f" of {self._total:,}"
        line += f" {self._unit}, {rate:,.1f}/s"
        if extra:
            line += f", {extra}"
        if self._total and rate and self._done < self._total:
            line += f", {_duration((self._total - self._done) / rate)} left"
        line = one_line(line)
        if self._live:
            self._live.update(self._task, completed=self._done, line=line)
        elif now - self._printed >= PLAIN_EVERY_S or self._done == self._total:
            self._printed = now
            say(f"{self._stage:<9} {line}")


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A terse two-column table to stderr; title and cells are `literal`."""
    heading = literal(title, "table.title")
    table = Table(title=heading, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(literal(name), literal(value))
    console.print(table)
    sys.stderr.flush()


def print_counts(title: str, counts: Mapping[str, Any]) -> None:
    """`print_table` of numbers; zeros are left out."""
    print_table(title, [(name, f"{value:,}") for name, value in counts.items() if value])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
