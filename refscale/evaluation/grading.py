"""What a judge says about answers: single-answer ratings, and pairs of answers in both orders.

In: questions, answers, judge prompts, a `Judge`. Out: one row a judgement with the judge's words,
and scores per category, overall, and for the technical categories. Nothing is dropped silently: a
reply without a readable verdict and a request that failed stay in the rows and are counted beside
every score that lacks them.

Intervals resample questions, whose two turns belong together; that of a win rate of which no
resample differs, as where all is won, is Wilson's, for as many trials as there are questions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refscale.errors import ConfigError, EvaluationError
from refscale.evaluation.holdout import wilson
from refscale.evaluation.judge import (
    Judge,
    Judgement,
    Messages,
    parse_preference,
    parse_rating,
)
from refscale.evaluation.questions import Answer, JudgePrompt, Question

# As the paper behind refscale groups MT-Bench's categories.
TECHNICAL = ("coding", "math", "reasoning")
# Rated with the reference answer at hand, where the question has one.
REFERENCED = ("math", "reasoning", "coding")
RESAMPLES = 2000
# Judge prompts' output_format that can be read, by kind of judgement.
_OUTPUTS = {"single": "[[rating]]", "pair": "[[A]]"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Grading:
    """All judgements as rows, and the scores made of them."""

    rows: list[Row]
    scores: dict[str, Any]


# -- single answers --------------------------------------------------------------------------------


def grade(
    judge: Judge,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    prompts: Mapping[str, JudgePrompt],
) -> Grading:
    """Rate each turn from 1 to 10.

    Returns:
        Rows: question_id, category, turn, prompt, judgment (the judge's words), score (None where
        unreadable or failed), error. Scores: `{"overall", "technical", "categories": {name: …},
        "turns": {"1", "2"}}`, each `{"n", "score", "low", "high", "unparsable", "failed"}` with a
        95 % interval; score is None where no judgement could be read.

    Raises:
        ConfigError: A judge prompt is missing or asks for something that we do not have.
        EvaluationError: A question has no answer; the judge refuses altogether, or not one
            judgement came back.
    """
    given = _by_question(questions, answers)
    plan = []
    for question in questions:
        for turn in range(1, len(question.turns) + 1):
            prompt = _prompt(prompts, "single", question, turn)
            texts = _single_texts(turn, given[question.question_id].turns)
            plan.append((question, turn, prompt, _messages(prompt, question, turn, texts)))
    judgements = _ask(judge, [messages for *_, messages in plan])
    rows = [
        {
            **_identity(question, turn, prompt, judgement),
            "score": None if judgement.text is None else parse_rating(judgement.text),
        }
        for (question, turn, prompt, _), judgement in zip(plan, judgements, strict=True)
    ]
    return Grading(rows, _summary(rows, lambda row: row["score"], "score"))


# -- pairs of answers ------------------------------------------------------------------------------


def compare(
    judge: Judge,
    questions: Sequence[Question],
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    prompts: Mapping[str, JudgePrompt],
) -> Grading:
    """Compare two models' answers, each pair in both orders.

    A turn is won or lost only where both orders say so; all else that can be read is a tie, and
    `inconsistent` counts the ties whose orders disagree: they show the judge's bias for a position.

    Returns:
        Rows: as for `grade` with judgments in both orders, `verdict` (win | tie | loss | None) and
        `inconsistent`. Scores: as for `grade`, with `win_rate` (wins and half the ties) in the
        place of `score`, and wins, ties, losses, inconsistent.

    Raises:
        ConfigError: As `grade`.
        EvaluationError: As `grade`.
    """
    mine, others = _by_question(questions, ours), _by_question(questions, theirs)
    plan = []
    for question in questions:
        for turn in range(1, len(question.turns) + 1):
            prompt = _prompt(prompts, "pair", question, turn)
            sides = (mine[question.question_id].turns, others[question.question_id].turns)
            for a_turns, b_turns in (sides, sides[::-1]):
                texts = _pair_texts(turn, a_turns, b_turns)
                plan.append((question, turn, prompt, _messages(prompt, question, turn, texts)))
    judgements = _ask(judge, [messages for *_, messages in plan])
    rows = []
    for i in range(0, len(plan), 2):
        question, turn, prompt, _ = plan[i]
        first, second = judgements[i], judgements[i + 1]
        row = _identity(question, turn, prompt, first)
        row["judgment_swapped"] = second.text
        row["error"] = first.error or second.error
        row["verdict"], row["inconsistent"] = _verdict(first, second)
        rows.append(row)
    worth = {"win": 1.0, "tie": 0.5, "loss": 0.0, None: None}
    scores = _summary(rows, lambda row: worth[row["verdict"]], "win_rate")
    return Grading(rows, scores)


def _verdict(first: Judgement, second: Judgement) -> tuple[str | None, bool]:
    """What both orders say of ours, which is A in the first and B in the second."""
    if first.text is None or second.text is None:
        return None, False
    straight, swapped = parse_preference(first.text), parse_preference(second.text)
    if straight is None or swapped is None:
        return None, False
    one = {"A": "win", "B": "loss", "tie": "tie"}[straight]
    other = {"A": "loss", "B": "win", "tie": "tie"}[swapped]
    return (one, False) if one == other else ("tie", True)


# -- asking ----------------------------------------------------------------------------------------


def _ask(judge: Judge, conversations: Sequence[Messages]) -> list[Judgement]:
    """The judgements, of which at least one came back."""
    judgements = judge.ask(conversations)
    if judgements and all(judgement.error is not None for judgement in judgements):
        raise EvaluationError(
            f"none of {len(judgements)} judgements came back from {judge.config.model} at"
            f" {judge.config.base_url}; the last error: {judgements[-1].error}. The answers are"
            " kept, the same command asks again"
        )
    return judgements


# -- prompts ---------------------------------------------------------------------------------------


def check_prompts(
    questions: Sequence[Question],
    prompts: Mapping[str, JudgePrompt],
    kinds: Sequence[str] = tuple(_OUTPUTS),
) -> None:
    """Refuse what `grade` ("single") or `compare` ("pair") would refuse, before there are answers.

    Raises:
        ConfigError: A judge prompt is missing or asks for something that we do not have.
    """
    for kind in kinds:
        for question in questions:
            unsaid = [""] * len(question.turns)
            for turn in range(1, len(question.turns) + 1):
                prompt = _prompt(prompts, kind, question, turn)
                single = kind == "single"
                texts = _single_texts(turn, unsaid) if single else _pair_texts(turn, unsaid, unsaid)
                _messages(prompt, question, turn, texts)


def _prompt(
    prompts: Mapping[str, JudgePrompt], kind: str, question: Question, turn: int
) -> JudgePrompt:
    referenced = question.reference is not None and question.category in REFERENCED
    version = "v2" if kind == "pair" and not referenced else "v1"
    name = f"{kind}-{'math-' if referenced else ''}{version}{'-multi-turn' if turn > 1 else ''}"
    if name not in prompts:
        raise ConfigError(
            f"the judge prompts have no {name}; they have {', '.join(sorted(prompts)) or 'none'}"
        )
    if prompts[name].output_format != _OUTPUTS[kind]:
        raise ConfigError(
            f"the judge prompt {name} has output_format {prompts[name].output_format}; only"
            f" {_OUTPUTS[kind]} can be read"
        )
    return prompts[name]


def _single_texts(turn: int, turns: Sequence[str]) -> dict[str, str]:
    """What the prompt of a turn may ask for of an answer."""
    return {f"answer{_part(turn, i)}": turns[i - 1] for i in _seen(turn)}


def _pair_texts(turn: int, a_turns: Sequence[str], b_turns: Sequence[str]) -> dict[str, str]:
    """As `_single_texts`, of two answers."""
    return {
        f"answer_{side}{_part(turn, i)}": turns[i - 1]
        for side, turns in (("a", a_turns), ("b", b_turns))
        for i in _seen(turn)
    }


def _messages(
    prompt: JudgePrompt, question: Question, turn: int, texts: Mapping[str, str]
) -> list[dict[str, str]]:
    fields = dict(texts)
    for i in _seen(turn):
        fields[f"question{_part(turn, i)}"] = question.turns[i - 1]
    for i, reference in enumerate(question.reference or (), 1):
        fields[f"ref_answer_{i}"] = reference
    try:
        text = prompt.prompt_template.format(**fields)
    except (KeyError, IndexError, ValueError) as exc:
        raise ConfigError(
            f"the judge prompt {prompt.name} asks for {exc}, which we do not have; it may use"
            f" {', '.join(f'{{{name}}}' for name in fields)}"
        ) from exc
    return [
        {"role": "system", "content": prompt.system_prompt},
        {"role": "user", "content": text},
    ]


def _seen(turn: int) -> range:
    """Turns that the judge of a turn is shown."""
    return range(1, turn + 1)


def _part(turn: int, number: int) -> str:
    """Suffix of a placeholder: none in the first turn's prompts, _1 and _2 in the second's."""
    return "" if turn == 1 else f"_{number}"


def _by_question(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[Any, Answer]:
    given = {answer.question_id: answer for answer in answers}
    missing = [question.question_id for question in questions if question.question_id not in given]
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {len(questions)} questions have no answer, such as {missing[0]};"
            " generate the answers to this set of questions first"
        )
    return given


def _identity(question: Question, turn: int, prompt: JudgePrompt, judgement: Judgement) -> Row:
    return {
        "question_id": question.question_id,
        "category": question.category,
        "turn": turn,
        "prompt": prompt.name,
        "judgment": judgement.text,
        "error": judgement.error,
    }


# -- scores ----------------------------------------------------------------------------------------


def _summary(
    rows: Sequence[Row], value_of: Callable[[Row], float | None], name: str
) -> dict[str, Any]:
    def over(some: Sequence[Row]) -> dict[str, Any]:
        return _score(some, value_of, name)

    return {
        "overall": over(rows),
        "technical": over([row for row in rows if row["category"] in TECHNICAL]),
        "categories": {
            category: over([row for row in rows if row["category"] == category])
            for category in dict.fromkeys(row["category"] for row in rows)
        },
        "turns": {
            str(turn): over([row for row in rows if row["turn"] == turn])
            for turn in dict.fromkeys(row["turn"] for row in rows)
        },
    }


def _score(
    rows: Sequence[Row], value_of: Callable[[Row], float | None], name: str
) -> dict[str, Any]:
    values: dict[Any, list[float]] = {}
    for row in rows:
        value = value_of(row)
        if value is not None:
            values.setdefault(row["question_id"], []).append(value)
    failed = sum(row["error"] is not None for row in rows)
    read = sum(map(len, values.values()))
    result: dict[str, Any] = {"n": read, name: None, "low": None, "high": None}
    if values:
        sums = np.array([[sum(given), len(given)] for given in values.values()], dtype=np.float64)
        rng = np.random.default_rng(0)
        picks = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
        resampled = sums[picks].sum(axis=1)
        means = resampled[:, 0] / resampled[:, 1]
        low, high = np.quantile(means, [0.025, 0.975])
        value = float(sums[:, 0].sum() / read)
        if name == "win_rate" and low == high:
            # No resample differs, and an interval would claim certainty.
            share = wilson(value * len(sums), len(sums))
            low, high = share["low"], share["high"]
        result.update({name: value, "low": float(low), "high": float(high)})
    result.update(unparsable=len(rows) - read - failed, failed=failed)
    if rows and "verdict" in rows[0]:
        for verdict, plural in (("win", "wins"), ("tie", "ties"), ("loss", "losses")):
            result[plural] = sum(row["verdict"] == verdict for row in rows)
        result["inconsistent"] = sum(row["inconsistent"] for row in rows)
    return result
