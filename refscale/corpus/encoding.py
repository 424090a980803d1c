"""Canonical pair -> token ids, by the rules of TRL 1.16's DPOTrainer, to the token.

The one place that knows chat template, boundary, EOS and truncation:

- string: the EOS string is appended to a completion unless it ends with it; prompt, prompt + chosen
  and prompt + rejected are tokenised on their own, with the tokenizer's default special tokens;
- chat: the template renders the prompt with a generation prompt, and prompt + completion without;
- boundary: where the tokenised prompt and one of the two sequences part, for both sides alike;
- truncation: each side's sequence keeps its first max_length tokens; a prompt that alone has as
  many is refused.

TRL decides string or chat by the first row of a data set, we by each row. Texts are tokenised in
batches; it costs what the tokenizer costs, about half a microsecond a token.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from refscale.config import Config
from refscale.config_file import explain_model_name
from refscale.corpus.pairs import Messages, Pair, Refusal, shorten
from refscale.errors import ModelError, StorageError
from refscale.storage.fingerprints import file_sha256, model_fingerprint

_TOKENIZER_FILES = (
    "tokenizer*",
    "tokenization_*.py",  # code of its own, for trust_remote_code
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
)
# What a template raises when a conversation is not to its taste.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
)


@dataclass(slots=True)
class Encoded:
    """Token ids of a pair, already truncated, and what was done to get there."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_truncated: bool
    rejected_truncated: bool
    # The tokenised prompt is no prefix of a tokenised side: its end went to the completions.
    boundary_shifted: bool


@dataclass(frozen=True)
class EncoderSettings:
    """What an Encoder is made of; hashable and picklable, so that workers build their own.

    Attributes:
        chat_template: Jinja source that replaces the tokenizer's own; None keeps that.
    """

    model_name_or_path: str
    revision: str | None
    trust_remote_code: bool
    chat_template: str | None
    max_length: int
    truncation: str

    @classmethod
    def of(cls, config: Config, revision: str | None) -> "EncoderSettings":
        """Those of a run, with the tokenizer at `revision`.

        Raises:
            ConfigError: The chat template cannot be read.
        """
        return cls(
            model_name_or_path=config.model.model_name_or_path,
            revision=revision,
            trust_remote_code=config.model.trust_remote_code,
            chat_template=read_chat_template(config.model.chat_template),
            max_length=config.encoding.max_length,
            truncation=config.encoding.truncation,
        )

    def load(self) -> "Encoder":
        """The encoder; loading a tokenizer takes a second.

        Raises:
            ModelError: There is no usable tokenizer.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.model_name_or_path,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
            )
        except (OSError, ValueError, ImportError, KeyError) as exc:
            error = (
                f"the tokenizer of model.model_name_or_path = {self.model_name_or_path} cannot be"
                f" loaded: {shorten(str(exc), 200)}"
            )
            raise ModelError(explain_model_name(self.model_name_or_path, error)) from exc
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return Encoder(tokenizer, max_length=self.max_length, truncation=self.truncation)


class Encoder:
    """Encodes pairs in batches.

    Args:
        tokenizer: A transformers tokenizer.
        max_length: Tokens of prompt + completion that are kept.
        truncation: keep_start, or quarantine to refuse longer pairs.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, truncation: str = "keep_start") -> None:
        self.tokenizer = tokenizer
        self._max_length, self._refuse_long = max_length, truncation == "quarantine"
        self._eos, self._bos_id = tokenizer.eos_token, tokenizer.bos_token_id
        self._fast = tokenizer.backend_tokenizer if self._is_plain(tokenizer) else None
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.tokenizer.chat_template)

    @property
    def has_eos(self) -> bool:
        """Whether strings can be ended."""
        return bool(self._eos)

    @staticmethod
    def _is_plain(tokenizer: Any) -> bool:
        """Whether the Rust tokenizer alone gives what calling `tokenizer` gives."""
        if not getattr(tokenizer, "is_fast", False):
            return False
        probe = ["", "a probe", " of\n\nwhat  the\ttokenizer <s> does é"]
        texts = [*probe, f"{tokenizer.eos_token} x {tokenizer.bos_token or ''}"]
        called = [
            tokenizer(texts, add_special_tokens=special)["input_ids"] for special in (True, False)
        ]
        fast = tokenizer.backend_tokenizer
        return called == [
            [item.ids for item in fast.encode_batch_fast(texts, add_special_tokens=special)]
            for special in (True, False)
        ]

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded | Refusal]:
        """Token ids of each pair, or why it has none; in the order given.

        Raises:
            ModelError: A string pair, and the tokenizer has no EOS.
        """
        results: list[Encoded | Refusal | None] = [None] * len(pairs)
        chats = [i for i, pair in enumerate(pairs) if pair.conversational]
        if len(chats) < len(pairs):
            strings = [i for i, pair in enumerate(pairs) if not pair.conversational]
            texts = [self._string_texts(pairs[i]) for i in strings]
            for i, result in zip(strings, self._encode_texts(texts, special=True), strict=True):
                results[i] = result
        if chats:
            rendered = self._render([pairs[i] for i in chats])
            kept = [(i, text) for i, text in zip(chats, rendered, strict=True)]
            for i, text in kept:
                if isinstance(text, Refusal):
                    results[i] = text
            good = [(i, text) for i, text in kept if not isinstance(text, Refusal)]
            encoded = self._encode_texts([text for _, text in good], special=False)
            for (i, _), result in zip(good, encoded, strict=True):
                results[i] = result
        return [result for result in results if result is not None]

    # -- texts -------------------------------------------------------------------------------

    def _string_texts(self, pair: Pair) -> tuple[str, str, str]:
        if not self._eos:
            raise ModelError(
                f"the tokenizer {self.tokenizer.name_or_path} has no EOS token, which ends string"
                " completions; add one to its tokenizer_config.json or use chat pairs"
            )
        prompt, chosen, rejected = pair.prompt_text, pair.chosen_text, pair.rejected_text
        if not chosen.endswith(self._eos):
            chosen += self._eos
        if not rejected.endswith(self._eos):
            rejected += self._eos
        return prompt, prompt + chosen, prompt + rejected

    def _render(self, pairs: Sequence[Pair]) -> list[tuple[str, str, str] | Refusal]:
        """Prompt, prompt + chosen and prompt + rejected of each conversation as text."""
        if not self.has_chat_template:
            refusal = Refusal("template_failed", "the tokenizer has no chat template")
            return [refusal for _ in pairs]
        if all(pair.tools is None and not pair.template_kwargs for pair in pairs):
            try:
                prompts = self._apply([_of(p, p.prompt) for p in pairs], True)
                chosen = self._apply([_of(p, p.prompt) + _of(p, p.chosen) for p in pairs], False)
                rejected = self._apply(
                    [_of(p, p.prompt) + _of(p, p.rejected) for p in pairs], False
                )
                return list(zip(prompts, chosen, rejected, strict=True))
            except _TEMPLATE_ERRORS:
                # One of them; which, the rows one by one will tell.
                return [self._render_one(pair) for pair in pairs]
        return [self._render_one(pair) for pair in pairs]

    def _render_one(self, pair: Pair) -> tuple[str, str, str] | Refusal:
        prompt = _of(pair, pair.prompt)
        kwargs = {"tools": pair.tools, **(pair.template_kwargs or {})}
        try:
            return (
                self._apply([prompt], True, **kwargs)[0],
                self._apply([prompt + _of(pair, pair.chosen)], False, **kwargs)[0],
                self._apply([prompt + _of(pair, pair.rejected)], False, **kwargs)[0],
            )
        except _TEMPLATE_ERRORS as exc:
            return Refusal("template_failed", shorten(f"{type(exc).__name__}: {exc}", 200))

    def _apply(self, chats: list[Messages], generation: bool, **kwargs: Any) -> list[str]:
        rendered: list[str] = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=generation, **kwargs
        )
        return rendered

    # -- ids ---------------------------------------------------------------------------------

    def _tokenize(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        if self._fast is None:
            ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
            return ids
        return [
            item.ids for item in self._fast.encode_batch_fast(texts, add_special_tokens=special)
        ]

    def _encode_texts(
        self, texts: Sequence[tuple[str, str, str]], *, special: bool
    ) -> list[Encoded | Refusal]:
        # Prompts repeat within a batch: each is tokenised once.
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(t[0] for t in texts))}
        flat = [*prompts, *(t[1] for t in texts), *(t[2] for t in texts)]
        ids = self._tokenize(flat, special=special)
        first, second = len(prompts), len(prompts) + len(texts)
        return [
            self._split(ids[prompts[t[0]]], ids[first + i], ids[second + i], special=special)
            for i, t in enumerate(texts)
        ]

    def _split(
        self, prompt: list[int], chosen: list[int], rejected: list[int], *, special: bool
    ) -> Encoded | Refusal:
        """Boundary and truncation of one pair; `chosen` and `rejected` start with the prompt."""
        limit = self._max_length
        length = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
        if length >= limit:
            return Refusal(
                "prompt_too_long",
                f"the prompt has {length} tokens, encoding.max_length is {limit}",
            )
        if special and chosen[:2] == [self._bos_id, self._bos_id]:
            return Refusal("double_bos", f"the ids start with {chosen[:3]}; take BOS off the text")
        for name, ids in (("chosen", chosen), ("rejected", rejected)):
            if len(ids) > limit and self._refuse_long:
                return Refusal(
                    "too_long",
                    f"prompt + {name} have {len(ids)} tokens, encoding.max_length is {limit}",
                )
            # A sequence's first token has no log-prob.
            if len(ids) <= max(length, 1):
                return Refusal("no_scored_tokens", f"{name} has none of the {len(ids)} tokens")
        encoded = Encoded(
            prompt_ids=prompt[:length],
            chosen_ids=chosen[length:limit],
            rejected_ids=rejected[length:limit],
            chosen_truncated=len(chosen) > limit,
            rejected_truncated=len(rejected) > limit,
            boundary_shifted=length < len(prompt),
        )
        if encoded.chosen_ids == encoded.rejected_ids:
            return Refusal(
                "identical_tokens", f"both sides are the same {len(encoded.chosen_ids)} tokens"
            )
        return encoded


def _of(pair: Pair, part: str | Messages) -> Messages:
    assert not isinstance(part, str), f"pair {pair.pair_id.hex()} is not a conversation"
    return part


def common_prefix_length(ids: list[int], others: list[int]) -> int:
    """Leading tokens that both have."""
    limit = min(len(ids), len(others))
    if ids[:limit] == others[:limit]:
        return limit
    low, high = 0, limit - 1
    while low < high:
        middle = (low + high + 1) // 2
        if ids[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def read_chat_template(path: str | None) -> str | None:
    """The Jinja source that model.chat_template names; None without one.

    Raises:
        ModelError: It cannot be read or is not a template.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except jinja2.TemplateSyntaxError as exc:
        # transformers adds tags of its own, such as {% generation %}: it has the last word.
        if "unknown tag" not in str(exc):
            raise ModelError(
                f"model.chat_template {path} is not a Jinja template: line {exc.lineno}: {exc}"
            ) from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelError(f"model.chat_template {path} cannot be read: {exc}") from exc
    return text


def tokenizer_fingerprint(settings: EncoderSettings) -> dict[str, str]:
    """What identifies tokenizer and template: hashes of a folder's files, or a hub commit.

    Raises:
        ModelError: Neither a folder whose files can be read nor a resolvable hub id.
    """
    folder = Path(settings.model_name_or_path)
    try:
        if folder.is_dir():
            files = {f for name in _TOKENIZER_FILES for f in folder.glob(name) if f.is_file()}
            found = {f.relative_to(folder).as_posix(): file_sha256(f) for f in sorted(files)}
        else:
            found = model_fingerprint(settings.model_name_or_path, settings.revision)
    except StorageError as exc:
        raise ModelError(str(exc)) from exc
    if settings.chat_template is not None:
        found["model.chat_template"] = hashlib.sha256(settings.chat_template.encode()).hexdigest()
    return found
