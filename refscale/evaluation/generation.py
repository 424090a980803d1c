"""What a local model says: its answers in conversations, its completions of prompts, by the batch.

In: conversations (chat messages that end with the user's), which go through the model's own chat
template, or prompts as token ids. Out: a text each, with its number of tokens. Batches are padded
on the left; sampling is plain temperature sampling, whatever the model's generation config prefers,
so that two policies differ in nothing but their weights. Equal batches give equal answers: the seed
is the batch's. No ray here: `CompletionStep` is a plain callable that an actor can host.

Costs: one forward a token for the whole batch, until its longest answer ends.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refscale.errors import ConfigError, EvaluationError, ModelError
from refscale.storage.copies import local_folder
from refscale.storage.fingerprints import digest

if TYPE_CHECKING:
    from refscale.run import Run

# In the fingerprint of kept answers. Raised when equal weights, prompts and settings would answer
# otherwise: answers made before are then not shown beside new ones.
GENERATION_VERSION = 1

Conversation = Sequence[Mapping[str, str]]
Item = dict[str, Any]


@dataclass(frozen=True)
class GeneratorSettings:
    """All that a generating replica needs; plain data.

    Attributes:
        model_name_or_path: Folder, URI of a folder, or hub id.
        revision: Hub revision.
        adapter: LoRA adapter folder that is merged in.
        dtype: "auto" or a torch dtype's name, as the config's `model.dtype`.
        attn_implementation: As the config's.
        chat_template: Path of a template that replaces the tokenizer's.
        trust_remote_code: As the config's.
        max_new_tokens: Longest answer.
        num_threads: torch threads; None leaves torch's own number.
        device: "cpu" leaves GPUs alone that are there; None takes all that the process can see.
    """

    model_name_or_path: str
    revision: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    max_new_tokens: int = 1024
    num_threads: int | None = None
    device: str | None = None


def replica_settings(run: "Run") -> dict[str, Any]:
    """The fields of GeneratorSettings that follow from where a run's replicas work.

    No answer's fingerprint holds them, so that another machine can go on with the rest.
    """
    ray = run.config.ray
    return {
        "num_threads": run.threads(ray.replica_bounds()[1], ray.cpus_per_replica),
        # Ray leaves CUDA_VISIBLE_DEVICES alone where no GPU is asked for.
        "device": None if run.gpus(ray.gpus_per_replica) else "cpu",
    }


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        text: Without special tokens and surrounding whitespace.
        num_tokens: Without the one that ends it.
        cut: It ended at max_new_tokens or at the end of the model's context.
    """

    text: str
    num_tokens: int
    cut: bool


class Generator:
    """A model that answers conversations.

    Raises:
        ModelError: The model cannot be loaded.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        from refscale.scoring.loading import merge_adapter, require_whole
        from refscale.scoring.reference import choose_dtype

        self.settings = settings
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        split = device == "cuda" and torch.cuda.device_count() > 1
        common: dict[str, Any] = {
            "revision": settings.revision,
            "trust_remote_code": settings.trust_remote_code,
        }
        options: dict[str, Any] = {}
        if settings.attn_implementation:
            options["attn_implementation"] = settings.attn_implementation
        if split:
            options["device_map"] = "auto"
        try:
            with local_folder(settings.model_name_or_path) as folder:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    folder, padding_side="left", **common
                )
                model = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=choose_dtype(settings.dtype, device)[0],
                    use_safetensors=True,
                    **common,
                    **options,
                )
            if split:
                require_whole(model, set())
            if settings.adapter is not None:
                model = merge_adapter(model, settings.adapter)
        except (OSError, ValueError, KeyError) as exc:
            raise ModelError(f"cannot load {settings.model_name_or_path}: {exc}") from exc
        self._model = (model if split else model.to(device)).eval()
        if settings.chat_template is not None:
            self._tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._stops = self._stop_ids()
        # transformers 5.23: generate() takes what it is not given, such as beams, min_p or banned
        # words, from the model's own.
        self._model.generation_config = GenerationConfig(
            bos_token_id=getattr(self._model.generation_config, "bos_token_id", None),
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._stops,
        )

    def _stop_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's and those of the model's generation config."""
        configured = getattr(self._model.generation_config, "eos_token_id", None)
        ids = {self._tokenizer.eos_token_id}
        ids.update(configured if isinstance(configured, list) else [configured])
        return sorted(i for i in ids if i is not None)

    def reply(
        self, conversations: Sequence[Conversation], *, temperature: float, seed: int
    ) -> list[Completion]:
        """The assistant's next message in each conversation, by the chat template.

        Args:
            conversations: One batch: all are in memory at once.
            temperature: 0 takes the likeliest token each time.
            seed: Of the sampling.

        Raises:
            ConfigError: The temperature is negative or not a number.
            EvaluationError: A conversation fills the model's context.
            ModelError: There is no chat template.
        """
        if self._tokenizer.chat_template is None:
            raise ModelError(
                f"the tokenizer of {self.settings.model_name_or_path} has no chat template; name"
                " one with model.chat_template"
            )
        texts = [
            self._tokenizer.apply_chat_template(
                list(conversation), add_generation_prompt=True, tokenize=False
            )
            for conversation in conversations
        ]
        # The template has written the special tokens already.
        prompts = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return self.complete(prompts, temperature=temperature, seed=seed)

    def complete(
        self, prompts: Sequence[Sequence[int]], *, temperature: float, seed: int
    ) -> list[Completion]:
        """What follows each prompt.

        Args:
            prompts: Token ids of one batch, none of them empty.
            temperature: As `reply`.
            seed: As `reply`.

        Raises:
            ConfigError: As `reply`.
            EvaluationError: As `reply`.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ConfigError(f"a temperature must be at least 0, got {temperature}")
        context = getattr(self._model.config, "max_position_embeddings", None) or math.inf
        rooms = [min(self.settings.max_new_tokens, context - len(prompt)) for prompt in prompts]
        if rooms and min(rooms) < 1:
            raise EvaluationError(
                f"a conversation of {max(map(len, prompts))} tokens fills the model's context of"
                f" {context}; shorten the questions or lower max_new_tokens, which earlier turns"
                " took up"
            )
        found: dict[int, Completion] = {}
        # One that nearly fills the context must not cut short those beside it.
        for room in sorted(set(rooms)):
            alike = [i for i, mine in enumerate(rooms) if mine == room]
            said = self._generate([prompts[i] for i in alike], int(room), temperature, seed)
            found.update(zip(alike, said, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _generate(
        self, prompts: Sequence[Sequence[int]], room: int, temperature: float, seed: int
    ) -> list[Completion]:
        """At most `room` tokens after each prompt."""
        import torch
        from transformers import GenerationConfig

        length = max(map(len, prompts))
        # Masked, so that any id serves a tokenizer without pad and eos.
        pad = self._tokenizer.pad_token_id or 0
        padded = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
        seen = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self._model.device
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature > 0
            else {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
        )
        torch.manual_seed(seed)
        with torch.inference_mode():
            ids = self._model.generate(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(seen, device=device),
                generation_config=GenerationConfig(
                    max_new_tokens=room,
                    pad_token_id=pad,
                    eos_token_id=self._stops or None,
                    repetition_penalty=1.0,
                    **sampling,
                ),
            )
        return [self._completion(row) for row in ids[:, length:].tolist()]

    def _completion(self, ids: list[int]) -> Completion:
        end = next((i for i, token in enumerate(ids) if token in self._stops), None)
        kept = ids if end is None else ids[:end]
        text = self._tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Completion(text, len(kept), cut=end is None)


class CompletionStep:
    """A step of a graph: an item's prompts in, their completions out.

    Items: `{"unit": name, "prompts": JSON list of lists of token ids, "temperature": float}`;
    results: `{"unit", "completions": JSON list of Completion fields}`. The seed comes from the
    prompts, so a retry on another replica says the same.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        self._generator = Generator(settings)

    def __call__(self, item: Item) -> Item:
        """The completions of one item."""
        found = self._generator.complete(
            json.loads(item["prompts"]),
            temperature=item["temperature"],
            seed=seed_of(item["prompts"]),
        )
        return {"unit": item["unit"], "completions": json.dumps([asdict(c) for c in found])}


def seed_of(value: Any) -> int:
    """A seed made from content: equal content, equal seed."""
    return int(digest(value)[:8], 16)
