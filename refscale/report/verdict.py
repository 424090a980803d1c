"""The verdict on a run: a few sentences at the top of its report, the most telling first.

In: the values of report.json. Out: sentences; each is left out where its numbers are not there.
"""

from typing import Any

Values = dict[str, Any]


def verdict(values: Values) -> list[str]:
    """The run in a few sentences, the most telling first."""
    selection, training = values["selection"] or {}, values["training"] or {}
    evaluation = values["evaluation"] or {}
    said = []
    size = _size(selection.get("share"))
    if (purity := evaluation.get("purity")) and purity["kept"]:
        kept, corpus, random = (
            _percent(purity[name]["value"]) for name in ("kept", "corpus", "random")
        )
        said.append(
            f"Of the kept {size}, {kept} have the right label; of the corpus, {corpus};"
            f" of a random {size}, {random}."
        )
    if overall := evaluation.get("overall"):
        accuracy = overall["reward_accuracy"]
        before, after = accuracy["before"], accuracy["after"]
        sentence = (
            f"Holdout reward accuracy {before['value']:.2f} → {after['value']:.2f}"
            f" [{after['low']:.2f}, {after['high']:.2f}] on {overall['n']:,} pairs"
        )
        if after["low"] <= before["value"] <= after["high"]:
            sentence += ", which is not clearly a change"
        said.append(sentence + ".")
    elif values["evaluation"] is not None:
        said.append("There is no holdout, so nothing says whether training helped.")
    loss = (training.get("curves") or {}).get("loss", {}).get("values") or []
    if len(loss) > 1:
        said.append(f"Training loss {loss[0]:.3f} → {loss[-1]:.3f} in {_steps(training)}.")
    if selection.get("num_pairs"):
        said.append(
            f"{selection['num_kept']:,} of {selection['num_pairs']:,} pairs kept by"
            f" {selection['strategy']}, {selection['keep']}"
            f"{', lengths matched' if selection.get('match_lengths') else ''}."
        )
    if selection.get("follows_length"):
        correlation = f"{selection['all']['key_length_correlation']:+.2f}".replace("-", "−")
        said.append(
            "The selection key follows length: its correlation with the difference in tokens is"
            f" {correlation}, so length was selected as well."
        )
    if selection.get("leans"):
        lean = selection["length_lean"]
        said.append(
            f"The kept pairs lean to a {'longer' if lean > 0 else 'shorter'} chosen side, by"
            f" {abs(lean):.0%} of a usual difference in tokens: training may learn that instead."
        )
    stale = [f"{s['command']}, {s['stale']}" for s in values["stages"] if s["stale"]]
    if stale:
        said.append(f"Left out as stale: {'; '.join(stale)}.")
    todo = [s["command"] for s in values["stages"] if not s["done"] and not s["stale"]]
    if todo:
        said.append(f"Not finished: {', '.join(todo)}.")
    return said


def _size(share: float | None) -> str:
    if share is None:
        return "part"
    return "half" if abs(share - 0.5) < 0.005 else _percent(share)


def _percent(share: float) -> str:
    """Whole percents, but never 0 % or 100 % of something in between."""
    digits = 0
    while float(shown := f"{100 * share:.{digits}f}") in (0, 100) and share not in (0, 1):
        digits += 1
    return f"{shown} %"


def _steps(training: Values) -> str:
    last, total = training.get("last_step"), training.get("max_steps")
    if training.get("finished") or not total:
        return f"{last:,} steps"
    return f"{last:,} of {total:,} steps so far"
