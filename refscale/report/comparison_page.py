"""A comparison for people: lines for the terminal, and one self-contained page.

In: comparison.json's values. Out: text, and HTML with inline SVG in the report's style. The page
opens with what came out, whichever way it did.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from refscale.report.plots import intervals

_TEMPLATES = Path(__file__).parent / "templates"
_HEADLINE = "reward_accuracy"
TITLES = {
    "reward_accuracy": "holdout preference accuracy",
    "reward_margin": "implicit reward margin, nats",
    "ranking_accuracy": "ranking accuracy of the policy",
    "chosen_mean_logps": "log-prob of chosen, nats a token",
}

COSTS = {
    "pairs": "pairs",
    "mean_length_difference": "mean_length_difference",
    "right_labels": "right_labels",
    "prefers_longer": "longer_side.preferred",
    "train_s": "train_s",
    "train_gpu_s": "train_gpu_s",
    "mean_tokens": "extra.mean_tokens",
    "win_rate": "extra.against_reference.win_rate",
}


def lines(comparison: Mapping[str, Any]) -> list[str]:
    """The headline table, one line an arm, and the verdicts."""
    width = max(len(arm) for arm in ["arm", *comparison["arms"]])
    shown = [f"{'arm':<{width}} {'accuracy':>20} {'sd':>6} {'against random':>22} {'train s':>9}"]
    for arm, measures in comparison["arms"].items():
        measure = measures[_HEADLINE]
        sd = "" if measure["seed_sd"] is None else f"{measure['seed_sd']:.3f}"
        shown.append(
            f"{arm:<{width}} {_estimate(measure, signed=False):>20} {sd:>6}"
            f" {_estimate(measure['against_random'], signed=True):>22}"
            f" {_number(_mean(comparison, arm, 'train_s'), ',.0f'):>9}"
        )
    for arm in comparison["arms"]:
        tokens, wins = (_mean(comparison, arm, COSTS[name]) for name in ("mean_tokens", "win_rate"))
        if tokens == tokens:
            judged = f", win rate against the reference model {wins:.3f}" if wins == wins else ""
            shown.append(f"{arm}: completions of {tokens:,.0f} tokens{judged}")
    return [*shown, *verdicts(comparison)]


def verdicts(comparison: Mapping[str, Any]) -> list[str]:
    """What the holdout accuracy says of each selection, in words; no claim without its interval."""
    said = []
    alone = " (one training each)" if len(comparison["seeds"]) == 1 else ""
    for arm, measures in comparison["arms"].items():
        for other, name in (
            ("against_random", "random pairs of equal size"),
            ("against_full", "all pairs"),
        ):
            difference = measures[_HEADLINE][other]
            if difference is None or comparison["controls"].get(arm) is None:
                continue
            if difference["low"] is None:
                outcome = "not told apart from"
            elif difference["low"] > 0:
                outcome = "better than"
            elif difference["high"] < 0:
                outcome = "worse than"
            else:
                outcome = "not told apart from"
            said.append(f"{arm} is {outcome} {name}: {_estimate(difference, signed=True)}{alone}")
    return said


def render_html(comparison: Mapping[str, Any]) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    rows = [_row(comparison, arm) for arm in comparison["arms"]]
    costs: list[dict[str, Any]] = [
        {"arm": arm, **{key: _mean(comparison, arm, name) for key, name in COSTS.items()}}
        for arm in comparison["arms"]
    ]
    return environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        verdicts=verdicts(comparison),
        titles=TITLES,
        rows=rows,
        costs=costs,
        number=_number,
        judged={
            "lengths": all(cost["mean_tokens"] == cost["mean_tokens"] for cost in costs),
            "wins": all(cost["win_rate"] == cost["win_rate"] for cost in costs),
        },
        plots=[_plot(comparison, measure) for measure in TITLES],
    )


def _plot(comparison: Mapping[str, Any], measure: str) -> Markup:
    """One measure of every arm, beside its random control (a ring) where it has one."""
    rows = []
    for arm, measures in comparison["arms"].items():
        control = comparison["controls"].get(arm)
        beside = control if control in comparison["arms"] else arm
        rows.append((arm, comparison["arms"][beside][measure]["value"], measures[measure]))
    values = [(before, at["value"], at["low"], at["high"]) for _, before, at in rows]
    ends = [end for row in values for end in row if end is not None]
    room = 0.05 * (max(ends) - min(ends)) or 0.05
    return intervals(rows, TITLES[measure], (min(ends) - room, max(ends) + room))


def _row(comparison: Mapping[str, Any], arm: str) -> dict[str, Any]:
    measures = comparison["arms"][arm]
    return {
        "arm": arm,
        "cells": [
            {
                "value": _estimate(measures[measure], signed=False),
                "seeds": ", ".join(f"{value:.3f}" for value in measures[measure]["seeds"]),
                "against_random": _estimate(measures[measure]["against_random"], signed=True),
                "against_full": _estimate(measures[measure]["against_full"], signed=True),
            }
            for measure in TITLES
        ],
    }


def _mean(comparison: Mapping[str, Any], arm: str, name: str) -> float:
    """Mean of a figure over an arm's seeds, a dotted name; NaN where one was not measured."""
    found: list[float] = []
    for run in comparison["runs"][arm].values():
        value: Any = run
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            return float("nan")
        found.append(value)
    return sum(found) / len(found)


def _number(value: float, spec: str) -> str:
    """A number in words of `format`; a dash where it was not measured."""
    return format(value, spec) if value == value else "–"


def _estimate(estimate: Mapping[str, float | None] | None, *, signed: bool) -> str:
    if estimate is None:
        return "–"
    form = "+.3f" if signed else ".3f"
    if estimate["low"] is None:
        return f"{estimate['value']:{form}} (no interval)"
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"
