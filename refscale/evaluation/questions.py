"""Questions, answers and judge prompts of MT-Bench, in FastChat's file formats.

In: question.jsonl, judge_prompts.jsonl and reference answers that the user names, or the small set
that comes with the package. Out: checked values; what does not fit is named by file and line.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from refscale.errors import ConfigError

TURNS = 2


@dataclass(frozen=True)
class Question:
    """A question of two turns, with reference answers where the judge needs them."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Answer:
    """A model's answer: one text, length and cut flag a turn."""

    question_id: int | str
    turns: tuple[str, ...]
    num_tokens: tuple[int, ...]
    cut: tuple[bool, ...]


@dataclass(frozen=True)
class JudgePrompt:
    """One entry of judge_prompts.jsonl."""

    name: str
    system_prompt: str
    prompt_template: str
    output_format: str


# -- files -----------------------------------------------------------------------------------------


def load_questions(path: str | None = None, references: str | None = None) -> list[Question]:
    """Questions in FastChat's format.

    Args:
        path: A question.jsonl: question_id, category, turns, and optionally reference. None takes
            the package's own set.
        references: A file of reference answers (question_id, choices[0].turns), which replace those
            of the questions.

    Raises:
        ConfigError: A file cannot be read, a line is not as it should be (names it), or not one
            reference is of a question.
    """
    answers = {} if references is None else _load_references(references)
    questions = []
    for where, row in _rows(path, "question.jsonl"):
        try:
            question = Question(
                row["question_id"],
                str(row["category"]),
                _texts(row["turns"]),
                _texts(row["reference"]) if row.get("reference") else None,
            )
        except (LookupError, TypeError) as exc:
            raise ConfigError(f"{where} is no question (question_id, category, turns)") from exc
        reference = answers.get(question.question_id, question.reference)
        if len(question.turns) != TURNS or (reference and len(reference) != TURNS):
            raise ConfigError(f"{where}: turns and reference must have {TURNS} texts each")
        questions.append(
            Question(question.question_id, question.category, question.turns, reference)
        )
    ids = [question.question_id for question in questions]
    repeated = sorted({str(i) for i in ids if ids.count(i) > 1})
    if not questions or repeated:
        raise ConfigError(
            f"{path} holds no question"
            if not questions
            else f"{path} holds question_id {repeated[0]} twice"
        )
    if references is not None and answers.keys().isdisjoint(ids):
        theirs = ", ".join(map(repr, list(answers)[:3])) or "none"
        raise ConfigError(
            f"{references} answers not one of the {len(ids)} questions: their question_id are such"
            f" as {ids[0]!r}, it has {theirs}; name the reference answers of these questions"
        )
    return questions


def _load_references(path: str) -> dict[Any, tuple[str, ...]]:
    answers = {}
    for where, row in _rows(path, ""):
        try:
            answers[row["question_id"]] = _texts(row["choices"][0]["turns"])
        except (LookupError, TypeError) as exc:
            raise ConfigError(f"{where} is no answer (question_id, choices[0].turns)") from exc
    return answers


def load_judge_prompts(path: str | None = None) -> dict[str, JudgePrompt]:
    """Judge prompts by name, in FastChat's format; None takes the package's own wording.

    Raises:
        ConfigError: The file cannot be read, or a line is not as it should be.
    """
    prompts = {}
    for where, row in _rows(path, "judge_prompts.jsonl"):
        try:
            names = ("name", "system_prompt", "prompt_template", "output_format")
            prompts[row["name"]] = JudgePrompt(**{name: str(row[name]) for name in names})
        except (LookupError, TypeError) as exc:
            raise ConfigError(
                f"{where} is no judge prompt (name, system_prompt, prompt_template, output_format)"
            ) from exc
    return prompts


def _rows(path: str | None, own: str) -> Iterable[tuple[str, Any]]:
    """(file:line, value) of a jsonl file, or of the package's own."""
    try:
        if path is None:
            text = (resources.files("refscale.evaluation") / "data" / own).read_text("utf-8")
        else:
            text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path or own}: {exc}") from exc
    # Not splitlines(): JSON strings may hold U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path or own}:{number}", json.loads(line)
            except ValueError as exc:
                raise ConfigError(f"{path or own}:{number} is not JSON: {exc}") from exc


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("not a list of texts")
    return tuple(values)
