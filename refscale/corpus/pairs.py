"""Raw row -> canonical preference pair, or a refusal with its reason.

In: a row of a source as a dict, in any of the shapes of shapes.py. Out: a `Pair`, or a `Refusal`
whose code is a key of REASONS. Nothing is repaired by guessing: a row that does not say plainly
what was preferred over what is refused, counted and kept in quarantine. Costs some microseconds.

A pair's identity is its content: `pair_id`, `prompt_hash` and what is derived from them (holdout
split, source weight) do not depend on row order, file split or field order. A pair without a prompt
shares its prompt with no other: its two completions, in either order, stand in for it.
"""

import datetime
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Code of a refusal -> what it means. Codes are stable: quarantine tables and scripts hold them.
REASONS: dict[str, str] = {
    "bad_encoding": "the row is not UTF-8, or holds half of a surrogate pair",
    "bad_json": "the line is not JSON, or an object in it has a key twice",
    "row_too_large": "the row is larger than corpus.max_row_bytes",
    "wrong_type": "a field, or the row itself, has a type that its shape does not allow",
    "missing_field": "a field that the shape needs is absent",
    "null_field": "a field that the shape needs is null",
    "empty_messages": "a message list is empty, or a conversation has no prompt",
    "bad_roles": "roles are unknown or out of turn, or the assistant does not have the last word",
    "prompt_mismatch": "the two sides do not answer the same prompt",
    "empty_chosen": "the chosen completion is empty or white space",
    "empty_rejected": "the rejected completion is empty or white space",
    "identical_pair": "chosen and rejected are equal",
    "tie": "neither side is preferred",
    "unlabelled": "the row does not say which side is preferred",
    "template_failed": "the chat template refused the conversation",
    "double_bos": "the text starts with the BOS that the tokenizer adds itself",
    "identical_tokens": "the sides are equal once encoded and cut to encoding.max_length",
    "prompt_too_long": "the prompt alone reaches encoding.max_length",
    "too_long": "a side exceeds encoding.max_length, with encoding.truncation: quarantine",
    "no_scored_tokens": "a completion has no token that carries a log-prob",
}

# Passthrough values beyond this many characters in total are left out, by name.
_PASSTHROUGH_CHARS = 16_384
LEFT_OUT = "_left_out"

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Refusal:
    """Why a row is not used: a code of REASONS and what was seen."""

    reason: str
    detail: str


class RefusedError(Exception):
    """Raised inside this module and shapes.py; `canonical_pair` turns it into a `Refusal`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.refusal = Refusal(reason, detail)


@dataclass(slots=True)
class Pair:
    """A canonical pair: three strings, or three non-empty lists of messages.

    `prompt_text`, `chosen_text`, `rejected_text` are the same as text: canonical JSON for chats.
    `prompt_hash` is that of the completions where the prompt is empty.
    """

    conversational: bool
    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    prompt_text: str
    chosen_text: str
    rejected_text: str
    pair_id: bytes
    swapped_id: bytes  # pair_id of the pair with its sides swapped
    prompt_hash: bytes
    passthrough: str
    # Columns of the row that TRL hands to the chat template; None where the row has none.
    tools: Any = None
    template_kwargs: dict[str, Any] | None = None


def make_pair(
    prompt: str | Messages,
    chosen: str | Messages,
    rejected: str | Messages,
    row: Mapping[str, Any],
    used: frozenset[str],
    *,
    allow_empty: bool,
) -> Pair:
    """A checked pair.

    Args:
        prompt: String or messages, as both completions.
        chosen: The preferred completion.
        rejected: The other one.
        row: The raw row, for passthrough columns, `tools` and `chat_template_kwargs`.
        used: Columns of `row` that prompt and completions were made of.
        allow_empty: Accept empty completions.

    Raises:
        RefusedError: A completion is empty, the sides are equal, roles are out of turn, or the text
            cannot be encoded.
    """
    tools, kwargs = None, None
    if conversational := not isinstance(prompt, str):
        _check_turns(prompt, chosen, rejected)
        tools = _decoded(row, "tools", list)
        kwargs = _decoded(row, "chat_template_kwargs", dict)
        context = canonical_json([tools, kwargs]) if tools is not None or kwargs else ""
        texts = [canonical_json(part) for part in (prompt, chosen, rejected)]
    else:
        context, texts = "", [str(prompt), str(chosen), str(rejected)]
    if texts[1] == texts[2]:
        raise RefusedError("identical_pair", f"both sides are {shorten(texts[1])}")
    if not allow_empty:
        for name, value in (("chosen", chosen), ("rejected", rejected)):
            if _is_empty(value):
                raise RefusedError(f"empty_{name}", f"{name} is {shorten(repr(value))}")
    kind = "chat" if conversational else "text"
    try:
        prompt_raw, chosen_raw, rejected_raw = (text.encode() for text in texts)
        head = f"{kind}:{context}".encode()
    except UnicodeEncodeError as exc:
        raise RefusedError("bad_encoding", f"half of a surrogate pair at {exc.start}") from exc
    # One hash for all pairs without a prompt would hold out all of them or none, and send them all
    # to one merge. Sorted: a pair meets its duplicates and the pair with its sides swapped.
    asked = (prompt_raw,) if prompt_raw else sorted((chosen_raw, rejected_raw))
    return Pair(
        conversational=conversational,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        prompt_text=texts[0],
        chosen_text=texts[1],
        rejected_text=texts[2],
        pair_id=content_hash(head, prompt_raw, chosen_raw, rejected_raw),
        swapped_id=content_hash(head, prompt_raw, rejected_raw, chosen_raw),
        prompt_hash=content_hash(head, *asked),
        passthrough=passthrough({k: v for k, v in row.items() if k not in used}),
        tools=tools,
        template_kwargs=kwargs,
    )


def content_hash(*parts: bytes) -> bytes:
    """128 bits of blake2b over the parts, each with its length, so that no two splits are equal."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(b"%d:" % len(part))
        hasher.update(part)
    return hasher.digest()


def fraction_of(content: bytes, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on content, seed and purpose alone."""
    hasher = hashlib.blake2b(content, digest_size=8, key=f"{purpose}:{seed}".encode())
    return int.from_bytes(hasher.digest(), "big") / 2**64


def canonical_json(value: Any) -> str:
    """JSON without white space, keys sorted, text unescaped."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def shorten(text: str, length: int = 80) -> str:
    """`text` in one line of at most `length` characters."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 1] + "…"


def passthrough(columns: Mapping[str, Any]) -> str:
    """The other columns of a row as one JSON object; NaN and infinities become null.

    What does not fit into 16,384 characters is left out, and named under `_left_out`.
    """
    try:
        text = json.dumps(columns, ensure_ascii=False, allow_nan=False, default=_plain_value)
        text.encode()
        if len(text) <= _PASSTHROUGH_CHARS:
            return text
    except (ValueError, TypeError):  # a NaN, half a surrogate pair, a key that is no string
        pass
    kept: dict[str, Any] = {}
    left_out, size = [], 0
    for name, value in columns.items():
        clean = _finite(value)
        length = len(json.dumps(clean, default=_plain_value)) + len(str(name)) + 8
        if size + length > _PASSTHROUGH_CHARS:
            left_out.append(str(name))
        else:
            kept[str(name)] = clean
            size += length
    if left_out:
        kept[LEFT_OUT] = left_out[:100]
    # Escaped, because half of a surrogate pair has no UTF-8.
    return json.dumps(kept, default=_plain_value)


def _plain_value(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _is_empty(value: str | Messages) -> bool:
    if isinstance(value, str):
        return not value or value.isspace()
    return all(
        not message.get("tool_calls")
        and (not (content := message.get("content")) or (_is_blank(content)))
        for message in value
    )


def _is_blank(content: Any) -> bool:
    if isinstance(content, str):
        return content.isspace()
    return all(not str(part.get("text", "")).strip() for part in content)


def _check_turns(prompt: Any, chosen: Any, rejected: Any) -> None:
    """Refuse conversations that a chat template would render as something else than they are.

    The prompt must end where the assistant is to speak, and a completion must be the assistant's
    own turn: TRL 1.16 trains on whatever the completion holds, a user's turn included.
    """
    if not prompt:
        raise RefusedError("empty_messages", "the conversation has no prompt")
    last = prompt[-1]["role"]
    if last not in ("user", "tool"):
        raise RefusedError("bad_roles", f"the prompt ends with a turn of {last}, not of user")
    before = None
    for i, message in enumerate(prompt):
        role = message["role"]
        if role == "system" and i and before != "system":
            raise RefusedError("bad_roles", f"prompt message {i} is of {role}, after {before}")
        if role == before and role in ("user", "assistant"):
            raise RefusedError("bad_roles", f"prompt messages {i - 1} and {i} are both of {role}")
        before = role
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        roles = [message["role"] for message in side]
        if roles[0] != "assistant" or roles[-1] != "assistant":
            raise RefusedError(
                "bad_roles",
                f"{name} has the turns {', '.join(roles[:6])}; it must start and end with the"
                " assistant",
            )
        strange = [role for role in roles if role not in ("assistant", "tool")]
        if strange:
            raise RefusedError("bad_roles", f"{name} holds a turn of {strange[0]}")
        if any(a == b == "assistant" for a, b in pairwise(roles)):
            raise RefusedError("bad_roles", f"{name} has two assistant turns in a row")


def _decoded(row: Mapping[str, Any], column: str, kind: type) -> Any:
    """A template column of a row; TRL allows tools as a JSON string."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as exc:
            raise RefusedError("wrong_type", f"{column} is a string but not JSON") from exc
    if value is not None and not isinstance(value, kind):
        raise RefusedError("wrong_type", f"{column} is {type(value).__name__}, not {kind.__name__}")
    return value
