"""The report of a run: report.html, self-contained, and the values of report.json that it shows.

In: a run folder, finished or not (`collect`). Out: strict JSON values (`report_json`) and one HTML
page (`render_html`) without a script and without anything to load, readable offline, in light and
dark, and on paper. Corpus text is hostile: jinja2 escapes all of it, and the page's policy forbids
scripts and requests. Costs seconds for a corpus of any size; the page stays below 1 MB.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from refscale.corpus.pairs import REASONS
from refscale.progress import visible
from refscale.report import plots
from refscale.report.values import ReportData, collect, report_json
from refscale.report.verdict import Values

__all__ = ["ReportData", "collect", "render_html", "report_json"]

_TEMPLATES = Path(__file__).parent / "templates"
# Rows of a table or a bar chart; report.json holds all of them.
_ROWS = 40
_FINGERPRINT_CHARACTERS = 6000
_LN2 = 0.6931471805599453
_CURVES: dict[str, dict[str, Any]] = {
    "loss": {"reference": _LN2},
    "rewards/margins": {"reference": 0.0},
    "rewards/accuracies": {"bounds": (0.0, 1.0), "reference": 0.5},
    "grad_norm": {},
    "learning_rate": {},
    "eval_loss": {"reference": _LN2},
    "eval_rewards/margins": {"reference": 0.0},
    "eval_rewards/accuracies": {"bounds": (0.0, 1.0), "reference": 0.5},
}


def render_html(data: ReportData) -> str:
    """The report as one HTML page of `report_json`'s values."""
    values = report_json(data)
    template = _environment().get_template("report.html.j2")
    return template.render(
        **values,
        rows=_ROWS,
        reasons=REASONS,
        plots=_plots(values),
        config_yaml=yaml.safe_dump(values["config"], sort_keys=False, allow_unicode=True),
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=count,
        percent=percent,
        figure=figure,
        significant=significant,
        signed=signed,
        si=si,
        estimate=estimate,
        turns=turns,
        visible=visible,
        fingerprint=fingerprint,
        moment=moment,
    )
    return environment


# -- numbers ---------------------------------------------------------------------------------------
#
# Each is shown rounded and carries its full value, the same as in report.json, in a <data> element.

_ABSENT = Markup("–")


def _data(value: float, shown: str) -> Markup:
    shown = shown.replace("-", "−")
    return Markup('<data value="{}">{}</data>').format(json.dumps(value), shown)


def count(value: Any) -> Markup:
    """1234567 as 1,234,567."""
    return _ABSENT if value is None else _data(value, f"{value:,.0f}")


def percent(value: Any) -> Markup:
    """0.5 as 50.0 %."""
    return _ABSENT if value is None else _data(value, f"{100 * value:.1f} %")


def figure(value: Any, digits: int = 3) -> Markup:
    """A number with that many digits after the point."""
    return _ABSENT if value is None else _data(value, f"{value:,.{digits}f}")


def significant(value: Any) -> Markup:
    """A number of any size with four significant digits; a whole one with all of its digits."""
    if value is None:
        return _ABSENT
    if float(value).is_integer():
        return _data(value, f"{value:,.0f}")
    return _data(value, f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}")


def signed(value: Any, digits: int = 3) -> Markup:
    """As `figure`, with its sign."""
    return _ABSENT if value is None else _data(value, f"{value:+,.{digits}f}")


def si(value: Any) -> Markup:
    """989e12 as 989 T."""
    if value is None:
        return _ABSENT
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return _data(value, f"{value / size:.3g} {prefix}")
    return _data(value, f"{value:.3g}")


def estimate(value: Any, digits: int = 3) -> Markup:
    """An estimate with its 95 % interval, where it has one."""
    if value is None:
        return _ABSENT
    if value["low"] == value["high"]:
        return figure(value["value"], digits)
    return Markup('{} <span class="ci">[{}, {}]</span>').format(
        *(figure(value[name], digits) for name in ("value", "low", "high"))
    )


# -- text ------------------------------------------------------------------------------------------


_DECODER = json.JSONDecoder()
# A stored message has its keys sorted: what was cut off its text took the role along.
_CUT_MESSAGE = re.compile(
    r'\{"content":"((?:[^"\\]|\\(?:u[0-9a-f]{4}|[^u]))*)(?:".*?"role":"(\w{1,20})")?', re.S
)


def turns(text: str) -> list[tuple[str | None, str]]:
    """A prompt or completion as (role, text): its messages if it is a chat, also one cut short.

    [("user", "Hi")] of '[{"content":"Hi","role":"user"}]', [(None, "Hi")] of 'Hi', and
    [("user", "Hi"), (None, "Hel…")] of '[{"content":"Hi","role":"user"},{"content":"Hel…'.
    """
    found: list[tuple[str | None, str]] = []
    rest = text[1:] if text.startswith("[{") else ""
    while rest.startswith("{"):
        try:
            message, end = _DECODER.raw_decode(rest)
        except ValueError:
            if not rest.endswith("…"):
                break
            if cut := _CUT_MESSAGE.match(rest.removesuffix("…")):
                return [*found, (cut[2], _unescape(cut[1]) + "…")]
            return [*found, (None, rest)] if found else [(None, text)]
        if not isinstance(message.get("role"), str) or "content" not in message:
            break
        content = message["content"]
        said = content if isinstance(content, str) else json.dumps(content)
        found.append((_valid(message["role"]), _valid(said)))
        rest = rest[end:].removeprefix(",")
        if rest == "]":
            return found
        if rest == "…":
            return [*found, (None, rest)]
    return [(None, text)]


def _unescape(inner: str) -> str:
    try:
        return _valid(json.loads(f'"{inner}"'))
    except ValueError:
        return inner


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def moment(text: str) -> str:
    """2026-01-31T12:30:59Z as 2026-01-31 12:30 UTC."""
    return f"{text[:16].replace('T', ' ')} UTC"


def fingerprint(value: Any) -> str:
    """A fingerprint as JSON, bounded."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if len(text) <= _FINGERPRINT_CHARACTERS:
        return text
    return text[:_FINGERPRINT_CHARACTERS] + "\n… (whole in report.json)"


# -- plots -----------------------------------------------------------------------------------------


def _plots(values: Values) -> dict[str, Any]:
    """The plots that the values allow, by name."""
    drawn: dict[str, Any] = {"curves": []}
    if funnel := values["funnel"]:
        steps = funnel["steps"]
        drawn["funnel"] = plots.bars(
            [(step["name"], step["count"], None, _of(step)) for step in steps],
            max((step["count"] for step in steps), default=0),
        )
    if selection := values["selection"]:
        drawn |= _selection_plots(selection)
    if (scoring := values["scoring"]) and scoring["replicas"]:
        replicas = list(scoring["replicas"].items())[:_ROWS]
        drawn["replicas"] = plots.bars(
            [(name, r["tokens_per_s"], None, f"{r['tokens_per_s']:,.0f}") for name, r in replicas],
            max(r["tokens_per_s"] for _, r in replicas),
        )
    if training := values["training"]:
        drawn["curves"] = [
            plots.curve(name, found["steps"], found["values"], **_CURVES[name])
            for name, found in training["curves"].items()
            if found["steps"]
        ]
    if (evaluation := values["evaluation"]) and evaluation["overall"]:
        named = {"all": evaluation["overall"], **(evaluation["sources"] or {})}
        if len(named) == 2:  # one source is all of it
            named.popitem()
        drawn["holdout"] = plots.intervals(
            [
                (name, m["reward_accuracy"]["before"]["value"], m["reward_accuracy"]["after"])
                for name, m in list(named.items())[:_ROWS]
            ],
            "reward accuracy",
            (0.0, 1.0),
        )
    return drawn


def _of(step: Values) -> str:
    share = "" if step["share"] is None else f" ({100 * step['share']:.1f} %)"
    return f"{step['count']:,}{share}"


def _selection_plots(selection: Values) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    key = selection["strategy"] or "selection key"
    if selection["histogram"]:
        drawn["histogram"] = plots.histogram(selection["histogram"], selection["cuts"], key)
    if selection["scatter"] and selection["scatter"]["keys"]:
        drawn["scatter"] = plots.scatter(
            selection["scatter"], "tokens of chosen minus tokens of rejected", key
        )
    if selection["sources"]:
        sources = list(selection["sources"].items())[:_ROWS]
        drawn["sources"] = plots.bars(
            [
                (name, s["pairs"], s["kept"], f"{100 * s['share']:.1f} % of {s['pairs']:,}")
                for name, s in sources
            ],
            max(s["pairs"] for _, s in sources),
        )
    return drawn
