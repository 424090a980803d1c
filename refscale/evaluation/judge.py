"""A judge behind any OpenAI-compatible chat endpoint: asked once a question, every reply kept.

In: chat messages. Out: a `Judgement` each, in order. Every reply is written to the run folder as a
file named by the hash of its request before it is used, so a killed run pays for nothing twice: the
same command asks only what is missing. Rate limits, server errors, timeouts and cut connections are
retried with growing pauses; a request that still fails is reported as failed and is never cached. A
reply without a readable verdict is kept with its text and counted, not guessed at.

Costs: a thread for each request in flight; tokens and money are counted in `Usage`.
"""

import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from refscale.config import Section
from refscale.errors import ConfigError, EvaluationError, StorageError
from refscale.evaluation.chat_endpoint import ChatEndpoint, Refused, valid_text
from refscale.storage.fingerprints import digest
from refscale.storage.store import Store

Messages = Sequence[Mapping[str, str]]

_FOLDER = "judgements"  # of the run
_LONGEST_PAUSE_S = 60.0
_LONGEST_RETRY_AFTER_S = 600.0


class JudgeConfig(Section):
    """The judge: which endpoint, which model, how patiently."""

    # A key put where its name belongs must not be shown.
    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str = Field(description="Such as http://127.0.0.1:8000/v1; /chat/completions is ours")
    model: str = Field(description="The judge's name at that endpoint.")
    api_key_env: str | None = Field(
        None, description="Name of the environment variable with the key; default: no key is sent."
    )
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(2048, gt=0, description="Longest reply, in tokens.")
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="More fields of the request, e.g. {seed: 0}; null takes a field out.",
    )
    concurrency: int = Field(8, gt=0, description="Requests in flight.")
    timeout_s: float = Field(120, gt=0, description="Seconds for one attempt.")
    max_attempts: int = Field(6, gt=0, description="Attempts at a request before it has failed.")
    backoff_s: float = Field(1.0, gt=0, description="First pause; doubles with each attempt.")
    prompt_price: float | None = Field(None, ge=0, description="Money per million prompt tokens.")
    completion_price: float | None = Field(
        None, ge=0, description="Money per million completion tokens."
    )

    @field_validator("base_url")
    @classmethod
    def _web_address(cls, value: str) -> str:
        if not re.match(r"https?://[^\s/]", value):
            raise ValueError(f"must begin with http:// or https://, got {value!r}")
        return value.rstrip("/")

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        ours = sorted(value.keys() & {"model", "messages", "stream"})
        if ours:
            raise ValueError(f"may not hold {', '.join(ours)}, which refscale sets itself")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, value: str | None) -> str | None:
        # Not shown: what is no name may be the key itself.
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("must be the name of an environment variable, not the key (not shown)")
        return value


def judge_config(**values: Any) -> JudgeConfig:
    """A JudgeConfig from a command line's values; those that are None take their default.

    Raises:
        ConfigError: A value is out of its range; one line, and never a key.
    """
    try:
        return JudgeConfig.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as exc:
        defects = []
        for error in exc.errors(include_input=False):
            name = ".".join(map(str, error["loc"]))
            defects.append(f"judge {name}: {error['msg'].removeprefix('Value error, ')}")
        raise ConfigError("; ".join(defects)) from None


def parse_extra(text: str) -> dict[str, Any]:
    """More fields of a request, as a command line gives them.

    Raises:
        ConfigError: It is not a JSON object.
    """

    def no_json(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, parse_constant=no_json)
        defect = "" if isinstance(value, dict) else f"got {type(value).__name__}"
    except ValueError as exc:
        value, defect = None, str(exc)
    if defect:
        raise ConfigError(
            f"--judge-extra must be a JSON object: {defect}; such as"
            """ '{"max_tokens": null, "max_completion_tokens": 2048}'"""
        )
    return dict(value)


@dataclass(frozen=True)
class Judgement:
    """What became of one request.

    Attributes:
        key: Hash of endpoint, model, messages and sampling; names the cached file.
        text: The reply as it came; None where the request failed.
        error: Why it failed; None where there is a reply.
        prompt_tokens: As the endpoint counted them; None where it did not say.
        completion_tokens: Likewise.
        finish_reason: The endpoint's own word; "length" means that the reply was cut.
        seconds: From the first attempt to the reply.
        attempts: Attempts that it took.
        cached: Read from the run folder: it cost nothing now.
    """

    key: str
    text: str | None
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    seconds: float = 0.0
    attempts: int = 0
    cached: bool = False


@dataclass
class Usage:
    """What the requests of this process cost; cached ones are counted apart."""

    requests: int = 0
    cached: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    without_counts: int = 0  # replies whose endpoint did not say their tokens

    def add(self, judgement: Judgement) -> None:
        """Count one judgement."""
        if judgement.cached:
            self.cached += 1
            return
        self.requests += 1
        self.retries += max(judgement.attempts - 1, 0)
        if judgement.error is not None:
            self.failed += 1
            return
        if judgement.prompt_tokens is None or judgement.completion_tokens is None:
            self.without_counts += 1
        self.prompt_tokens += judgement.prompt_tokens or 0
        self.completion_tokens += judgement.completion_tokens or 0

    def cost(self, config: JudgeConfig) -> float | None:
        """Money, in the unit of the config's prices; None without prices."""
        if config.prompt_price is None or config.completion_price is None:
            return None
        return (
            self.prompt_tokens * config.prompt_price
            + self.completion_tokens * config.completion_price
        ) / 1e6

    def to_json(self, config: JudgeConfig) -> dict[str, Any]:
        """As JSON values, with the cost."""
        return {**asdict(self), "cost": self.cost(config)}


# -- verdicts --------------------------------------------------------------------------------------

_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?\]\]")
# After the word, or at the very end: "arr[1]" in the middle of a reply about code rates nothing.
_SINGLE = r"\[\s*(\d+(?:\.\d+)?)\s*\]"
_SINGLE_BRACKETS = (
    re.compile(rf"\brating[\s:=*_]*(?:is\b)?[\s:=*_]*{_SINGLE}", re.IGNORECASE),
    re.compile(rf"(?<!\w){_SINGLE}[\s.*_]*\Z"),
)
_PREFERENCE = re.compile(r"\[\[\s*([ABC])\s*\]\]")

Preference = Literal["A", "B", "tie"]


def parse_rating(text: str) -> float | None:
    """The rating in "[[7]]", else in a "[7]" after the word rating or at the end; 1 to 10.

    Returns:
        None where there is none, it is out of range, or several different ones are given: which
        one the judge meant is not for us to say.
    """
    for patterns in ((_RATING,), _SINGLE_BRACKETS):
        found = {float(number) for pattern in patterns for number in pattern.findall(text)}
        if found:
            rating = found.pop()
            return rating if not found and 1 <= rating <= 10 else None
    return None


def parse_preference(text: str) -> Preference | None:
    """The verdict in "[[A]]", "[[B]]" or "[[C]]" (a tie); None as for `parse_rating`."""
    found = set(_PREFERENCE.findall(text))
    if len(found) != 1:
        return None
    verdict = found.pop()
    return "tie" if verdict == "C" else verdict


# -- the judge -------------------------------------------------------------------------------------


def api_key(config: JudgeConfig) -> str | None:
    """The key that the config names; None where it names none.

    Raises:
        ConfigError: The environment variable is named but not set.
    """
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"the judge's key should be in the environment variable {config.api_key_env},"
            " which is not set"
        )
    return key


class Judge:
    """A judge with its memory.

    Args:
        config: The endpoint.
        store: Run folder that replies are kept in.

    Raises:
        ConfigError: As `api_key`.
    """

    def __init__(self, config: JudgeConfig, store: Store) -> None:
        self.config, self.usage = config, Usage()
        self._store = store
        self._endpoint = ChatEndpoint(config.base_url, api_key(config), config.timeout_s)
        self._lock = threading.Lock()
        self._not_before = 0.0
        self._stop = threading.Event()

    def ask(self, conversations: Sequence[Messages]) -> list[Judgement]:
        """The judge's replies, in order; equal requests are asked once.

        Args:
            conversations: Chat messages of each request.

        Raises:
            EvaluationError: The endpoint refuses us as such (key, model, address). What had been
                answered is kept.
        """
        bodies = [self._body(messages) for messages in conversations]
        keys = [digest({"base_url": self.config.base_url, **body}) for body in bodies]
        done: dict[str, Judgement] = {}
        hopeless: Refused | None = None
        self._stop.clear()
        with ThreadPoolExecutor(self.config.concurrency, "judge") as pool:
            futures: dict[Future[Judgement], str] = {
                pool.submit(self._judge, key, body): key
                for key, body in dict(zip(keys, bodies, strict=True)).items()
            }
            try:
                for future in as_completed(futures):
                    try:
                        judgement = future.result()
                    except Refused as exc:
                        hopeless = hopeless or exc
                        continue
                    done[judgement.key] = judgement
                    self.usage.add(judgement)
            except BaseException:
                # Leave after the requests in flight, not after the whole queue.
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        if hopeless is not None:
            raise EvaluationError(
                f"the judge {self.config.model} at {self.config.base_url} refuses: {hopeless};"
                f" {sum(j.text is not None for j in done.values())} of {len(futures)} judgements"
                " are kept, the same command goes on"
            ) from None
        return [done[key] for key in keys]

    def _body(self, messages: Messages) -> dict[str, Any]:
        body = {
            "model": self.config.model,
            "messages": [{k: valid_text(v) for k, v in message.items()} for message in messages],
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
            **self.config.extra,
        }
        # OpenAI's reasoning models refuse max_tokens and temperature.
        return {name: value for name, value in body.items() if value is not None}

    def _judge(self, key: str, body: dict[str, Any]) -> Judgement:
        path = f"{_FOLDER}/{key[:2]}/{key}.json"
        kept = self._kept(path, key)
        if kept is not None:
            return kept
        started, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            try:
                self._wait_for_turn()
                reply = self._endpoint.post(body)
                break
            except Refused as exc:
                if exc.hopeless:
                    self._stop.set()  # here, so that no other request begins
                    raise
                if not exc.retry or attempt >= self.config.max_attempts:
                    seconds = time.monotonic() - started
                    return Judgement(key, None, str(exc), seconds=seconds, attempts=attempt)
                self._pause(attempt, exc.after_s)
        judgement = Judgement(
            key, **reply, seconds=round(time.monotonic() - started, 3), attempts=attempt
        )
        self._store.write_json(path, {"request": body, "judgement": asdict(judgement)})
        return judgement

    def _kept(self, path: str, key: str) -> Judgement | None:
        if not self._store.exists(path):
            return None
        try:
            kept = Judgement(**self._store.read_json(path)["judgement"])
        except (StorageError, KeyError, TypeError):
            return None  # damaged: ask again and overwrite it
        return Judgement(**{**asdict(kept), "cached": True}) if kept.key == key else None

    def _pause(self, attempt: int, after_s: float | None) -> None:
        pause = min(self.config.backoff_s * 2 ** (attempt - 1), _LONGEST_PAUSE_S)
        pause *= random.uniform(0.5, 1.0)  # so that the waiting do not come back all at once
        if after_s is not None:
            pause = max(pause, min(after_s, _LONGEST_RETRY_AFTER_S))
            with self._lock:
                # The limit is the account's, not the request's: all wait.
                self._not_before = max(self._not_before, time.monotonic() + pause)
        self._stop.wait(pause)

    def _wait_for_turn(self) -> None:
        while (wait := self._not_before - time.monotonic()) > 0 and not self._stop.is_set():
            self._stop.wait(wait)
        if self._stop.is_set():
            raise Refused("stopped", retry=False)
