"""The report's plots: inline SVG out of plain numbers, without a script, a font or a library.

In: lists of numbers. Out: Markup, with every text escaped. Colours are classes (`a` accent, `m`
muted, `g` grid, `c` cut, …) that the report's style sheet sets for light and dark. Each SVG has a
viewBox and scales with its column.
"""

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

_WIDTH = 720.0
_LABEL = 150.0  # room for names left of horizontal bars
_CUTS = 8  # groups whose cuts are drawn
_CHARACTERS = 20  # that fit there; a wide one counts twice
_LONG_NAME = 45  # characters of "length_adjusted_margin:smallest:0.5:matched", and two more


def bars(rows: Sequence[tuple[str, float, float | None, str]], largest: float) -> Markup:
    """Horizontal bars.

    Args:
        rows: (name, length, marked part of it or None, text at the end).
        largest: Length of a full bar.
    """
    full = _WIDTH - _LABEL - 200
    parts = []
    for i, (name, length, marked, text) in enumerate(rows):
        y = 26 * i
        width = full * length / largest if largest else 0.0
        parts.append(_text(_LABEL - 10, y + 16, _short(name), "end"))
        parts.append(_rect(_LABEL, y + 4, width, 17, "m" if marked is not None else "a"))
        if marked is not None:
            parts.append(_rect(_LABEL, y + 4, full * marked / largest if largest else 0, 17, "a"))
        parts.append(_text(_LABEL + width + 8, y + 16, text, "start", "v"))
    return _svg(_WIDTH, 26 * len(rows), parts, "bar chart of " + ", ".join(r[0] for r in rows[:8]))


def histogram(data: Mapping[str, Any], cuts: Mapping[str, Sequence[float]], axis: str) -> Markup:
    """Counts of all and of the kept pairs by key, with lines at the cuts.

    Args:
        data: low, high, and counts `all` and `kept` of equally wide bins.
        cuts: By group, keys at which the kept part begins or ends.
        axis: Name of the key.
    """
    low, high = data["low"], data["high"]
    frame = _Frame((low, high), (0.0, max(data["all"], default=0) or 1.0), 720, 270, top=28)
    parts = frame.axes(axis, "pairs")
    step = (high - low) / max(len(data["all"]), 1)
    for counts, style in ((data["all"], "m"), (data["kept"], "a")):
        for i, count in enumerate(counts):
            if count:
                left, top = frame.x(low + i * step), frame.y(count)
                width = max(frame.x(low + (i + 1) * step) - left - 1, 0.5)
                parts.append(_rect(left, top, width, frame.bottom - top, style))
    for ends in list(cuts.values())[:_CUTS]:
        for end in sorted(ends):
            x = frame.x(min(max(end, low), high))
            parts.append(_line(x, 18, x, frame.bottom, "c"))
            if len(cuts) == 1:
                # The first of two ends is labelled on its left, so that the labels do not meet.
                left = (len(ends) == 2 and end == min(ends) and x > 150) or x > frame.right - 80
                text = f"cut {_number(float(f'{end:.4g}'))}"
                parts.append(_text(x, 13, text, "end" if left else "start", "v"))
    return _svg(720, 270, parts, f"histogram of {axis}, all and kept")


def scatter(data: Mapping[str, Sequence[Any]], x_axis: str, y_axis: str) -> Markup:
    """Length differences against keys; the kept pairs stand out."""
    points = list(zip(data["length_differences"], data["keys"], data["kept"], strict=True))
    frame = _Frame(_span(p[0] for p in points), _span(p[1] for p in points), 720, 320)
    parts = frame.axes(x_axis, y_axis)
    for kept, style in ((False, "pm"), (True, "pa")):
        # A line of no length with round ends is a dot: one path for all of them.
        dots = "".join(
            f"M{frame.x(x):.0f} {frame.y(y):.1f}h0" for x, y, keep in points if bool(keep) == kept
        )
        if dots:
            parts.append(Markup('<path class="{}" d="{}"/>').format(style, dots))
    return _svg(720, 320, parts, f"{y_axis} against {x_axis}")


def curve(
    title: str,
    steps: Sequence[float],
    values: Sequence[float],
    *,
    reference: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Markup:
    """One quantity over the steps.

    Args:
        title: Its name.
        steps: Of each point.
        values: Of each point.
        reference: A value to draw a thin line at.
        bounds: Ends of the y axis; default: those of the values.
    """
    shown = list(values) + ([reference] if reference is not None else [])
    x_span = (min(steps), max(steps)) if min(steps) < max(steps) else _span(steps)
    frame = _Frame(x_span, bounds or _span(shown), 340, 190, top=26, left=58)
    parts = [_text(0, 13, title, "start", "t"), *frame.axes("step", None)]
    if reference is not None:
        parts.append(_line(frame.left, frame.y(reference), frame.right, frame.y(reference), "c"))
    points = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(steps, values, strict=True)]
    if len(points) == 1:
        parts.append(Markup('<path class="pa" d="M{}h0"/>').format(points[0]))
    else:
        parts.append(Markup('<path class="l" d="M{}"/>').format("L".join(points)))
    return _svg(340, 190, parts, f"{title} over the training steps")


def intervals(
    rows: Sequence[tuple[str, float, Mapping[str, Any]]], axis: str, bounds: tuple[float, float]
) -> Markup:
    """Values with a 95 % interval, each beside a value to compare it with.

    Args:
        rows: (name, other value, estimate); an estimate's low and high are None where it has no
            interval. Names have more than twice the room of bars.
        axis: Name of the quantity.
        bounds: Ends of the axis.
    """
    height = 24 * len(rows) + 44
    names = [_short(name, _LONG_NAME) for name, _, _ in rows]
    left = max(_LABEL, _LABEL / _CHARACTERS * max(map(_cells, names), default=0))
    frame = _Frame(bounds, (0.0, 1.0), _WIDTH, height, top=4, left=left)
    parts = frame.axes(axis, None, vertical=False)
    for i, (name, (_, before, after)) in enumerate(zip(names, rows, strict=True)):
        y = 24 * i + 18
        parts.append(_text(left - 10, y + 4, name, "end"))
        if after["low"] is not None:
            parts.append(_line(frame.x(after["low"]), y, frame.x(after["high"]), y, "l"))
        for value, style in ((before, "o"), (after["value"], "d")):
            parts.append(
                Markup('<circle class="{}" cx="{:.1f}" cy="{}" r="5"/>').format(
                    style, frame.x(value), y
                )
            )
    return _svg(_WIDTH, height, parts, f"{axis}: {', '.join(names)}")


# -- parts -----------------------------------------------------------------------------------------


class _Frame:
    """A plot's area and its two linear scales."""

    def __init__(
        self,
        x_span: tuple[float, float],
        y_span: tuple[float, float],
        width: float,
        height: float,
        *,
        top: float = 12,
        left: float = 64,
    ) -> None:
        self.left, self.right = left, width - 14
        self.top, self.bottom = top, height - 38
        self._x, self._y = x_span, y_span

    def x(self, value: float) -> float:
        low, high = self._x
        return self.left + (self.right - self.left) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self._y
        return self.bottom - (self.bottom - self.top) * (value - low) / (high - low)

    def axes(self, x_axis: str, y_axis: str | None, *, vertical: bool = True) -> list[Markup]:
        """Grid lines, tick labels and names of the axes."""
        parts = []
        for value in _ticks(*self._x, 6 if self.right - self.left > 400 else 4):
            x = self.x(value)
            parts.append(_line(x, self.bottom, x, self.bottom + 4, "g"))
            parts.append(_text(x, self.bottom + 17, _number(value), "middle"))
        if vertical:
            for value in _ticks(*self._y, 4):
                y = self.y(value)
                parts.append(_line(self.left, y, self.right, y, "g"))
                parts.append(_text(self.left - 7, y + 4, _number(value), "end"))
        else:
            parts += [
                _line(self.x(value), self.top, self.x(value), self.bottom, "g")
                for value in _ticks(*self._x, 6)
            ]
        parts.append(_line(self.left, self.bottom, self.right, self.bottom, "x"))
        parts.append(_text((self.left + self.right) / 2, self.bottom + 34, x_axis, "middle"))
        if y_axis:
            turned = Markup(
                '<text transform="translate(12 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>'
            )
            parts.append(turned.format((self.top + self.bottom) / 2, y_axis))
        return parts


def _span(values: Iterable[float]) -> tuple[float, float]:
    """Smallest and largest value with some room around them."""
    found = list(values) or [0.0]
    low, high = min(found), max(found)
    room = 0.04 * (high - low) or 0.1 * abs(low) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in [low, high], about that many."""
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = min((m * magnitude for m in (1, 2, 5, 10)), key=lambda m: abs((high - low) / m - about))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        text = f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    else:
        text = f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.6g}"
    return text.replace("-", "−")


def _cells(text: str) -> int:
    """Its width in narrow characters."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _short(text: str, room: int = _CHARACTERS) -> str:
    """The beginning of a text that fits beside a bar, or in so many narrow characters."""
    if _cells(text) <= room:
        return text
    while _cells(text) >= room:
        text = text[:-1]
    return text + "…"


def _svg(width: float, height: float, parts: Iterable[Markup], label: str) -> Markup:
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        width, height, label, Markup("").join(parts)
    )


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> Markup:
    named = Markup(' class="{}"').format(style) if style else Markup("")
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>').format(
        x, y, anchor, named, escape(text)
    )


def _rect(x: float, y: float, width: float, height: float, style: str) -> Markup:
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        style, x, y, max(width, 0.0), max(height, 0.0)
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        style, x1, y1, x2, y2
    )
