r"""The shapes in which preference data comes: detection, and each shape's way to a canonical pair.

    trl            prompt (or none: then it is what both sides share), chosen, rejected
    ultrafeedback  prompt string, and full conversations that repeat it
    hh             transcripts with "\n\nHuman:" and "\n\nAssistant:" turns
    helpsteer3     context, response1, response2, overall_preference (its sign says which)
    columns        trl's, under other names

Strings and chat messages are told apart row by row. Role names of other conventions (from/value,
human/gpt) are normalised.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from refscale.corpus.pairs import (
    Messages,
    Pair,
    Refusal,
    RefusedError,
    make_pair,
    shorten,
)
from refscale.errors import CorpusError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_PLAIN_KEYS = {"role", "content"}

Parts = tuple[Any, Any, Any, frozenset[str]]


def canonical_pair(
    row: Any, shape: str, columns: Mapping[str, str] | None = None, *, allow_empty: bool = False
) -> Pair | Refusal:
    """A row as a canonical pair, or why it is none.

    Args:
        row: The raw row; anything but a mapping is refused.
        shape: One of this module's shapes; never "auto".
        columns: For the shape columns: our name to the row's.
        allow_empty: Accept empty completions.
    """
    try:
        if not isinstance(row, dict):
            raise RefusedError("wrong_type", f"the row is {type(row).__name__}, not an object")
        prompt, chosen, rejected, used = _SHAPES[shape](row, columns or {})
        return make_pair(prompt, chosen, rejected, row, used, allow_empty=allow_empty)
    except RefusedError as exc:
        return exc.refusal
    except RecursionError:
        return Refusal("wrong_type", "the row is nested too deeply")


def detect_shape(rows: Sequence[Any], where: str) -> tuple[str, str]:
    """The shape that most of the given rows have, and the evidence for it as a phrase.

    Args:
        rows: The first rows of a source; what is not an object does not vote.
        where: Name of the source, for the message.

    Raises:
        CorpusError: No row has a known shape; the message names the columns that were seen.
    """
    objects = [row for row in rows if isinstance(row, dict)]
    votes = Counter(shape for row in objects if (shape := _shape_of(row)))
    if not votes:
        seen = ", ".join(sorted({str(key) for row in objects for key in row})[:20])
        raise CorpusError(
            f"{where}: no pair in the first {len(rows)} row(s), which have the columns"
            f" {seen or '(none)'}; name yours with format: columns and"
            " columns: {prompt: …, chosen: …, rejected: …}"
        )
    shape, count = votes.most_common(1)[0]
    return shape, f"{count} of the first {len(rows)} rows"


def _shape_of(row: Mapping[str, Any]) -> str | None:
    if "overall_preference" in row and "response1" in row and "response2" in row:
        return "helpsteer3"
    if "chosen" not in row or "rejected" not in row:
        return None
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        both = (chosen, rejected)
        turns = all(text.lstrip("\n").startswith("Human:") and ASSISTANT in text for text in both)
        if turns and (prompt is None or isinstance(prompt, str)):
            return "hh"
    elif isinstance(prompt, str) and isinstance(chosen, list):
        return "ultrafeedback"
    return "trl"


# -- shapes --------------------------------------------------------------------------------------


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise RefusedError("missing_field", f"{name} is absent; the row has {_names(row)}")
    if row[name] is None:
        raise RefusedError("null_field", f"{name} is null")
    return row[name]


def _names(row: Mapping[str, Any]) -> str:
    return shorten(", ".join(str(key) for key in row)) or "no columns"


def _trl(row: Mapping[str, Any], columns: Mapping[str, str]) -> Parts:
    names = {name: columns.get(name, name) for name in ("prompt", "chosen", "rejected")}
    chosen, rejected = _field(row, names["chosen"]), _field(row, names["rejected"])
    prompt = None
    if "prompt" in columns or names["prompt"] in row:
        prompt = _field(row, names["prompt"])
    if isinstance(prompt, str) and not isinstance(chosen, str) and not columns:
        raise RefusedError(
            "wrong_type",
            f"prompt is a string and chosen is {type(chosen).__name__}; format: ultrafeedback"
            " reads such rows",
        )
    return *_parts(prompt, chosen, rejected), frozenset(names.values())


def _ultrafeedback(row: Mapping[str, Any], columns: Mapping[str, str]) -> Parts:
    chosen, rejected, prompt = (_field(row, key) for key in ("chosen", "rejected", "prompt"))
    if not isinstance(prompt, str) or isinstance(chosen, str):
        raise RefusedError(
            "wrong_type",
            f"prompt is {type(prompt).__name__} and chosen {type(chosen).__name__}; ultrafeedback"
            " has a string and messages",
        )
    return *_parts(prompt, chosen, rejected), frozenset(("prompt", "chosen", "rejected"))


def _hh(row: Mapping[str, Any], columns: Mapping[str, str]) -> Parts:
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    prompt = _field(row, "prompt") if "prompt" in row else None
    values = [("chosen", chosen), ("rejected", rejected)]
    for name, value in values if prompt is None else [*values, ("prompt", prompt)]:
        if not isinstance(value, str):
            raise RefusedError("wrong_type", f"{name} is {type(value).__name__}, not a string")
    if prompt is None:
        prompt = _transcript_prompt(chosen, "chosen")
        if _transcript_prompt(rejected, "rejected") != prompt:
            raise RefusedError("prompt_mismatch", "the transcripts differ before their last turn")
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if chosen.startswith(ASSISTANT) and rejected.startswith(ASSISTANT):
            prompt += ASSISTANT
            chosen, rejected = chosen[len(ASSISTANT) :], rejected[len(ASSISTANT) :]
    elif chosen.startswith(HUMAN) or rejected.startswith(HUMAN):
        raise RefusedError("prompt_mismatch", "a transcript does not start with the prompt")
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if HUMAN in value:
            raise RefusedError("bad_roles", f"{name} holds a Human turn after the prompt")
    return prompt, chosen, rejected, frozenset(("prompt", "chosen", "rejected"))


def _transcript_prompt(text: str, name: str) -> str:
    """Everything up to and including the last "Assistant:"."""
    at = text.rfind(ASSISTANT)
    if at < 0:
        raise RefusedError("bad_roles", f"{name} has no Assistant turn: {shorten(repr(text))}")
    return text[: at + len(ASSISTANT)]


def _helpsteer3(row: Mapping[str, Any], columns: Mapping[str, str]) -> Parts:
    context, first, second = (_field(row, key) for key in ("context", "response1", "response2"))
    preference = row.get("overall_preference")
    if preference is None:
        raise RefusedError("unlabelled", "overall_preference is null or absent")
    if isinstance(preference, bool) or not isinstance(preference, (int, float)):
        raise RefusedError("wrong_type", f"overall_preference is {shorten(repr(preference))}")
    if preference != preference:
        raise RefusedError("unlabelled", "overall_preference is NaN")
    if preference == 0:
        raise RefusedError("tie", "overall_preference is 0")
    chosen, rejected = (first, second) if preference < 0 else (second, first)
    if isinstance(context, str):
        context = [{"role": "user", "content": context}]
    used = frozenset(("context", "response1", "response2"))
    return *_parts(context, chosen, rejected), used


_SHAPES: dict[str, Callable[[Mapping[str, Any], Mapping[str, str]], Parts]] = {
    "trl": _trl,
    "columns": _trl,
    "ultrafeedback": _ultrafeedback,
    "hh": _hh,
    "helpsteer3": _helpsteer3,
}


# -- parts -> prompt and completions -------------------------------------------------------------


def _parts(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt and completions of one kind: three strings, or three lists of messages."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RefusedError(
            "wrong_type",
            f"chosen is {type(chosen).__name__} and rejected {type(rejected).__name__}",
        )
    if isinstance(chosen, str):
        if prompt is None:
            return implicit_prompt(chosen, rejected)
        if isinstance(prompt, str):
            return prompt, chosen, rejected
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        return _messages(prompt, "prompt"), chosen, rejected
    chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if prompt is None:
        return _shared_turns(chosen, rejected)
    if isinstance(prompt, str):
        return _repeated_prompt(prompt, chosen, rejected)
    prompt = _messages(prompt, "prompt")
    n = len(prompt)
    if chosen[:n] == prompt and rejected[:n] == prompt and min(len(chosen), len(rejected)) > n:
        return prompt, chosen[n:], rejected[n:]
    return prompt, chosen, rejected


def implicit_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two texts that share their prompt: where they part, back to the start of that word.

    TRL 1.16 splits at the first differing character, so that 'Q: A: yes' and 'Q: A: yes indeed'
    become 'Q: A: ye' + 's' and 's indeed'. Here they are 'Q: A:' + ' yes' and ' yes indeed'. As in
    TRL, the space before the completion belongs to the completion; where the texts part at the
    start of a word the two agree.

    A word starts after white space, and, for texts without it, after full-width punctuation:
    '问：几？答：二。' and '问：几？答：三。' are '问：几？答：' + '二。' and '三。'. At the end of
    a text it belongs to the word before it: '答：二。' and '答：二。对。' are '答：' + '二。' and
    '二。对。'.

    Returns:
        prompt, chosen, rejected; the prompt may be empty.
    """
    if chosen == rejected:
        return "", chosen, rejected
    limit = min(len(chosen), len(rejected))
    low, high = 0, limit  # the longest common prefix, by halves
    while low < high:
        middle = (low + high + 1) // 2
        if chosen[:middle] == rejected[:middle]:
            low = middle
        else:
            high = middle - 1
    cut = low
    if not (cut < limit and chosen[cut].isspace() and rejected[cut].isspace()):
        if cut == limit:
            while cut and _is_wide_punctuation(chosen[cut - 1]):
                cut -= 1
        while cut and not (chosen[cut - 1].isspace() or _is_wide_punctuation(chosen[cut - 1])):
            cut -= 1
        if cut and chosen[cut - 1] == " ":
            cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _is_wide_punctuation(char: str) -> bool:
    """Whether it is punctuation of the width of an ideograph, such as ：。？！、「」."""
    return unicodedata.category(char)[0] == "P" and unicodedata.east_asian_width(char) in "WF"


def _shared_turns(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The leading messages that both conversations have, up to where the assistant answers."""
    if chosen == rejected:
        raise RefusedError("identical_pair", "both conversations are equal")
    limit = min(len(chosen), len(rejected))
    n = 0
    while n < limit and chosen[n] == rejected[n]:
        n += 1
    if n == limit:  # one conversation goes on where the other ends: the last answer is a completion
        n -= 1
        while n > 0 and chosen[n]["role"] != "assistant":
            n -= 1
    return chosen[:n], chosen[n:], rejected[n:]


def _repeated_prompt(
    prompt: str, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """A prompt string beside conversations: they repeat it, or are answers to it."""
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        return [{"role": "user", "content": prompt}], chosen, rejected
    shared, chosen, rejected = _shared_turns(chosen, rejected)
    asked = [m.get("content") for m in shared if m["role"] == "user"]
    wanted = prompt.strip()
    if not any(isinstance(text, str) and text.strip() == wanted for text in asked):
        raise RefusedError(
            "prompt_mismatch", f"no shared user turn is the prompt {shorten(repr(prompt))}"
        )
    return shared, chosen, rejected


def _messages(value: Any, what: str) -> Messages:
    """Messages with role and content, in TRL's names; keys whose value is null are dropped."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RefusedError("wrong_type", f"{what} is {type(value).__name__}, not messages")
    if not value:
        raise RefusedError("empty_messages", f"{what} has no messages")
    return [_message(message, f"{what}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, what: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RefusedError("wrong_type", f"{what} is {type(message).__name__}, not a message")
    if message.keys() == _PLAIN_KEYS:
        clean = message
    else:
        clean = {key: value for key, value in message.items() if value is not None}
        for ours, theirs in (("role", "from"), ("content", "value")):
            if ours not in clean and theirs in clean:
                clean[ours] = clean.pop(theirs)
    role, content = clean.get("role"), clean.get("content")
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise RefusedError("bad_roles", f"{what} has the role {shorten(repr(role))}")
    if content is None:
        if not clean.get("tool_calls"):
            raise RefusedError("null_field", f"{what} has no content")
    elif not isinstance(content, str) and not (
        isinstance(content, list)
        and all(isinstance(part, dict) and part.get("type") == "text" for part in content)
    ):
        raise RefusedError("wrong_type", f"{what}.content is {type(content).__name__}, not text")
    return clean if known == role else {**clean, "role": known}
