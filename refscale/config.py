"""The config of a run: one pydantic model per stage, YAML in, resolved YAML out.

In: plain data. Out: a Config. Unknown keys are refused and the nearest known one is named. Nothing
here imports torch or ray: `refscale validate` and `refscale config` answer at once.
"""

import difflib
import math
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from refscale.errors import ConfigError

Preset = Literal["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
FORMATS = ("auto", "trl", "hh", "ultrafeedback", "helpsteer3", "columns")


class Section(BaseModel):
    """Base of all sections: frozen, closed to unknown keys, and all numbers finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(Section):
    """The reference model: the SFT checkpoint that DPO starts from."""

    model_name_or_path: str = Field(description="Folder or hub id of the SFT checkpoint.")
    revision: str | None = Field(None, description="Hub revision; pin a commit hash.")
    adapter: str | None = Field(
        None,
        description="LoRA adapter folder that is merged into the model when it is loaded.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: bfloat16 where the device computes it fast, else float32. float16 is for"
        " scoring alone: what trains refuses it.",
    )
    attn_implementation: str | None = Field(
        None,
        description="Attention of the padded path; default: transformers' own choice.",
    )
    chat_template: str | None = Field(
        None, description="Path of a Jinja chat template that replaces the tokenizer's."
    )
    trust_remote_code: bool = Field(False, description="Run code that ships with the model.")


class Source(Section):
    """One source of preference pairs: files (`path`) or a Hugging Face dataset (`dataset`)."""

    path: str | None = Field(
        None,
        description="File, glob, folder, or s3:// gs:// URI of jsonl(.gz/.zst), json, parquet or"
        " arrow; or a folder written by datasets' save_to_disk. Relative to the config file.",
    )
    dataset: str | None = Field(
        None,
        description="Hugging Face dataset id, read from the hub; or the absolute path of a clone.",
    )
    subset: str | None = Field(None, description="Configuration name of the hub dataset.")
    revision: str | None = Field(None, description="Hub revision of the dataset.")
    split: str | None = Field(None, description="Split of a Hugging Face dataset.")
    name: str | None = Field(None, description="Name in reports; default: from the path.")
    format: Literal["auto", "trl", "hh", "ultrafeedback", "helpsteer3", "columns"] = Field(
        "auto",
        description="Shape of a row; auto: detected from the first rows, and said.",
    )
    columns: dict[str, str] | None = Field(
        None,
        description="Our column (prompt, chosen, rejected) to the source's column.",
    )
    max_rows: int | None = Field(None, gt=0, description="Read only the first rows; default all.")
    weight: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Fraction of the pairs that is used, picked by pair hash.",
    )
    holdout: bool | None = Field(
        None,
        description="true: all pairs are evaluated on and never trained on; false: none is held"
        " out; default: corpus.holdout_fraction applies.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("needs exactly one of path and dataset")
        if self.format == "columns" and not self.columns:
            raise ValueError("format: columns needs columns: {prompt: …, chosen: …, rejected: …}")
        unknown = set(self.columns or {}) - {"prompt", "chosen", "rejected"}
        if unknown:
            raise ValueError(
                f"columns maps {', '.join(sorted(unknown))}; only prompt, chosen and rejected"
                " can be mapped"
            )
        if self.columns and self.format not in ("auto", "trl", "columns"):
            raise ValueError(
                f"columns goes with format auto, trl or columns, got {self.format}, whose columns"
                " have fixed names; leave columns or format out"
            )
        for option, value in (("subset", self.subset), ("revision", self.revision)):
            if self.path is not None and value is not None:
                raise ValueError(
                    f"{option} goes with dataset, got {value!r} beside path, which has none; leave"
                    f" {option} out"
                )
        return self


class CorpusConfig(Section):
    """What is read, and what is refused."""

    sources: list[Source] = Field(min_length=1, description="Read in this order.")
    holdout_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of prompts kept for evaluation, by prompt hash.",
    )
    duplicates: Literal["drop", "keep"] = Field(
        "drop",
        description="drop: the first of equal pairs is kept, the others are counted. keep: all.",
    )
    contradictions: Literal["keep", "drop"] = Field(
        "keep",
        description="Pairs that also occur with sides swapped; drop removes both.",
    )
    max_bad_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="More refused rows than this end the run with exit code 3.",
    )
    allow_empty_completion: bool = Field(
        False, description="Keep pairs with an empty completion (it is then EOS alone)."
    )
    max_row_bytes: int = Field(
        10_000_000,
        gt=0,
        description="A row larger than this many bytes is quarantined.",
    )
    shard_pairs: int = Field(
        2000,
        gt=0,
        description="Pairs per shard, about: the unit of work, retry and resume.",
    )
    seed: int = Field(0, ge=0, description="Seed of the holdout split and of source weights.")


class EncodingConfig(Section):
    """How a pair becomes token ids; TRL's names and rules."""

    max_length: int = Field(1024, gt=1, description="Tokens of prompt + completion kept.")
    truncation: Literal["keep_start", "quarantine"] = Field(
        "keep_start",
        description="keep_start: cut a longer sequence at max_length, as TRL does; quarantine:"
        " refuse the pair.",
    )


class ScoreConfig(Section):
    """The scoring pass."""

    path: Literal["auto", "packed", "padded"] = Field(
        "auto",
        description="auto: packed where the model is served exactly, else padded.",
    )
    token_budget: int | None = Field(
        None, gt=0, description="Tokens per forward; default: from the device's memory."
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile of the packed path, which changes roundings. auto: on a GPU,"
        " from the first shard after a replica has scored for a minute, on a CPU with AMX in"
        " bfloat16 after five; on: from the first shard.",
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        None,
        description="Load the reference model quantised, by bitsandbytes, which has to be"
        " installed; changes the scores. Training then needs train.peft. The policy is evaluated"
        " unquantised.",
    )
    max_attempts: int = Field(
        3,
        gt=0,
        description="Attempts at a shard whose actor dies before the run fails.",
    )
    stalled_after_s: float = Field(
        14400,
        gt=0,
        description="Seconds in which no shard, unit or batch of any stage is finished, after which"
        " the run fails. Longer than a replica needs for corpus.shard_pairs pairs.",
    )


class SelectConfig(Section):
    """Which pairs are trained on."""

    strategy: Literal[
        "mean_margin",
        "margin",
        "abs_mean_margin",
        "abs_margin",
        "length_adjusted_margin",
        "ppl_gap",
        "required_loss",
        "random",
    ] = Field("mean_margin", description="The selection key; see the guide on selection.")
    keep: Literal["largest", "smallest", "middle", "band"] = Field(
        "largest", description="Which part of the order by key is kept."
    )
    fraction: float | None = Field(None, gt=0, le=1, description="Share kept; default 0.5.")
    count: int | None = Field(None, gt=0, description="Pairs kept.")
    threshold: float | None = Field(
        None,
        description="Keys from here up are kept; with keep: smallest those from here down.",
    )
    band: tuple[float, float] | None = Field(
        None,
        description="Quantiles (low, high) of the key between which pairs are kept.",
    )
    per_source: bool = Field(False, description="Select within each source on its own.")
    match_lengths: bool = Field(
        False,
        description="Select among pairs of about one length difference on their own (chosen longer"
        " or shorter by 0, 1, 2 to 3, 4 to 7 ... tokens), so that the kept pairs' lengths differ"
        " about as those of all.",
    )
    beta: float = Field(0.1, gt=0, description="DPO's beta, for required_loss.")
    seed: int = Field(0, ge=0, description="Seed of the strategy random.")

    def deciding_options(self) -> dict[str, Any]:
        """What a selection's fingerprint holds of this section.

        match_lengths is younger than the first run folders: it is left out where it is off, so that
        their selections stay valid.
        """
        return self.model_dump(exclude=None if self.match_lengths else {"match_lengths"})

    @model_validator(mode="before")
    @classmethod
    def _default_size(cls, data: Any) -> Any:
        if isinstance(data, dict) and all(
            data.get(key) is None for key in ("fraction", "count", "threshold", "band")
        ):
            return {**data, "fraction": 0.5}
        return data

    @model_validator(mode="after")
    def _one_size(self) -> "SelectConfig":
        sizes = [
            k for k in ("fraction", "count", "threshold", "band") if getattr(self, k) is not None
        ]
        if len(sizes) > 1:
            raise ValueError(f"got {' and '.join(sizes)}; give exactly one")
        if (self.keep == "band") != (self.band is not None):
            raise ValueError("keep: band and band: [low, high] go together")
        if self.band is not None and not 0 <= self.band[0] < self.band[1] <= 1:
            raise ValueError(f"band must be 0 <= low < high <= 1, got {list(self.band)}")
        if self.threshold is not None and self.keep not in ("largest", "smallest"):
            raise ValueError(f"threshold goes with keep largest or smallest, not {self.keep}")
        if self.threshold is not None and self.match_lengths:
            raise ValueError("match_lengths goes with fraction, count or band, not threshold")
        return self


class TrainConfig(Section):
    """DPO on the selection; TRL's names where the meaning is TRL's."""

    num_workers: int = Field(1, gt=0, description="Ray Train workers (data-parallel ranks).")
    deepspeed: Preset | dict[str, Any] | None = Field(
        "zero2",
        description="A preset, a DeepSpeed config or the path of one, or null for plain DDP.",
    )
    beta: float = Field(0.1, gt=0, description="DPO's beta.")
    loss_type: str = Field("sigmoid", description="A TRL loss that takes summed log-probs.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of labels that the loss takes for wrong."
    )
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate of AdamW.")
    lr_scheduler_type: str = Field("linear", description="A schedule of transformers.")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps that warm up.")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW, decoupled.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the selection.")
    max_steps: int = Field(-1, description="Optimizer steps; -1: from num_train_epochs.")
    per_device_train_batch_size: int = Field(
        8, gt=0, description="Pairs of a worker's micro-batch."
    )
    token_budget: int | None = Field(
        None,
        gt=0,
        description="Tokens of a worker's micro-batch; replaces per_device_train_batch_size.",
    )
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="Micro-batches of a worker an optimizer step."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in backward: less memory, more time."
    )
    bf16: bool | None = Field(
        None,
        description="Compute in bfloat16; default: what the scores were computed in.",
    )
    order: Literal["shuffled", "easy_to_hard"] = Field(
        "shuffled",
        description="easy_to_hard: by selection key, from the end that select.keep names on.",
    )
    packed: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Shared-prefix packed steps; auto: where the model is served exactly.",
    )
    peft: dict[str, Any] | None = Field(
        None,
        description="LoraConfig fields, e.g. {r: 16}. Dropout, random PiSSA and adapters on tied"
        " embeddings are refused: the policy would not be the one that was trained.",
    )
    seed: int = Field(42, ge=0, description="Of the shuffling.")
    logging_steps: int = Field(1, gt=0, description="Optimizer steps between log rows.")
    save_steps: int = Field(100, gt=0, description="Optimizer steps between checkpoints.")
    save_total_limit: int = Field(
        2,
        gt=0,
        description="Checkpoints kept: the latest; with eval_steps the best by the holdout's loss,"
        " and the latest.",
    )
    eval_steps: int | None = Field(
        None,
        gt=0,
        description="Optimizer steps between measurements of loss and rewards on the holdout;"
        " divides save_steps; default: none before the evaluation.",
    )
    load_best_model_at_end: bool = Field(
        False,
        description="The policy is the checkpoint with the lowest loss on the holdout instead of"
        " the last one; needs eval_steps. The evaluation then looks at pairs that chose it.",
    )
    report_to: list[str] = Field(default_factory=list, description="tensorboard, wandb, …")
    max_failures: int = Field(3, ge=0, description="Worker failures survived from checkpoints.")
    start_check_pairs: int = Field(
        8,
        ge=0,
        description="Pairs whose stored sums are compared with the policy's at step 0.",
    )
    trl: dict[str, Any] = Field(default_factory=dict, description="Other DPOConfig fields.")

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _known_preset(cls, value: Any) -> Any:
        presets = get_args(Preset)
        if value is None or isinstance(value, dict) or value in presets:
            return value
        nearest = difflib.get_close_matches(str(value), presets, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}? It" if nearest else "it"
        raise ValueError(
            f"got {value!r}; {hint} must be one of {', '.join(presets)}, a DeepSpeed config, or"
            " null for plain DDP"
        )

    @field_validator("deepspeed", "peft", "trl")
    @classmethod
    def _all_finite(cls, value: Any) -> Any:
        _refuse_infinite(value)
        return value

    @model_validator(mode="after")
    def _measured_when_saved(self) -> "TrainConfig":
        if self.load_best_model_at_end and self.eval_steps is None:
            raise ValueError("load_best_model_at_end needs eval_steps, which is not set")
        if self.eval_steps is not None and self.save_steps % self.eval_steps:
            raise ValueError(
                f"eval_steps must divide save_steps, so that every checkpoint is measured, got"
                f" {self.eval_steps} and {self.save_steps}"
            )
        return self


class EvaluateConfig(Section):
    """Holdout evaluation."""

    max_pairs: int | None = Field(None, gt=0, description="At most this many holdout pairs.")
    flipped_column: str | None = Field(
        None,
        description="Passthrough column that is true or 1 where a label is known to be wrong, false"
        " or 0 where it is right, and null or absent where nobody knows; the report then shows the"
        " label purity of corpus, selection and a random control.",
    )


class Replicas(Section):
    """Bounds of an elastic pool of scoring replicas."""

    min: int = Field(1, gt=0, description="Replicas that are always there.")
    max: int = Field(1, gt=0, description="Replicas at most, as the cluster has room.")

    @model_validator(mode="after")
    def _ordered(self) -> "Replicas":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class RayConfig(Section):
    """Where it runs."""

    address: str | None = Field(
        None, description="Ray address; default: RAY_ADDRESS, else an embedded Ray."
    )
    num_cpus: int | None = Field(None, gt=0, description="Logical CPUs of an embedded Ray.")
    replicas: int | Replicas = Field(
        1, description="Scoring replicas, or {min, max} to follow the cluster."
    )
    cpus_per_replica: float = Field(1, gt=0, description="CPUs of a scoring replica.")
    gpus_per_replica: float | None = Field(
        None, ge=0, description="Default: 1 where the cluster has GPUs now, else 0."
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of a training worker.")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="Default: 1 where the cluster has GPUs now, else 0."
    )
    cpus_per_task: float = Field(1, gt=0, description="CPUs of a reading or writing task.")
    wait_for_room_s: float = Field(
        3600,
        gt=0,
        description="Seconds, in all, that training waits for nodes with room for its workers, also"
        " where others hold it; an embedded Ray has room or refuses at once.",
    )

    @field_validator("replicas")
    @classmethod
    def _positive(cls, value: "int | Replicas") -> "int | Replicas":
        if isinstance(value, int) and value < 1:
            raise ValueError(f"replicas must be at least 1, got {value}")
        return value

    def replica_bounds(self) -> tuple[int, int]:
        """Smallest and largest number of scoring replicas."""
        if isinstance(self.replicas, int):
            return self.replicas, self.replicas
        return self.replicas.min, self.replicas.max


class Config(Section):
    """The whole config."""

    model: ModelConfig
    corpus: CorpusConfig
    encoding: EncodingConfig = Field(default_factory=EncodingConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    select: SelectConfig = Field(default_factory=lambda: SelectConfig.model_validate({}))
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    ray: RayConfig = Field(default_factory=RayConfig)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, data: Any) -> Any:
        """A section of which only the name is written is one of defaults."""
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}


def _refuse_infinite(value: Any, key: str = "") -> None:
    """As the sections do by themselves, in values of any kind, which they do not look into."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_infinite(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _refuse_infinite(inner, f"{key}.{i}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key[1:]} should be a finite number, got {value}")


def parse_config(data: dict[str, Any], origin: str = "config") -> Config:
    """A Config from plain data.

    Raises:
        ConfigError: A key is unknown (the nearest is named) or a value is out of its range.
            One line per defect.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as exc:
        lines = [_explain(error) for error in _relevant(exc.errors())]
        raise ConfigError(f"{origin}: " + "; ".join(dict.fromkeys(lines))) from exc


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _is_union_member(part: Any) -> bool:
    """Whether a part of an error's location is none of the user's keys."""
    if isinstance(part, int):
        return False
    return part in ("int", Replicas.__name__) or part.startswith(("function", "dict[", "literal["))


def _relevant(errors: list[Any]) -> list[Any]:
    """Without those of a union's member that takes no such value, where another member does."""

    def is_refused_kind(error: Any) -> bool:
        kinds = ("int_type", "model_type", "dict_type")
        return error["type"] in kinds and _is_union_member(error["loc"][-1])

    others = [error["loc"] for error in errors if not is_refused_kind(error)]

    def another_takes_it(error: Any) -> bool:
        union = error["loc"][:-1]
        return any(location[: len(union)] == union for location in others)

    return [e for e in errors if not (is_refused_kind(e) and another_takes_it(e))]


def _explain(error: Any) -> str:
    """One line for one pydantic error: key, value, rule, nearest name."""
    location = [part for part in error["loc"] if not _is_union_member(part)]
    dotted = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
        return f"unknown key {dotted}; {hint}"
    if error["type"] == "missing":
        return f"{dotted} is required"
    message = error["msg"].removeprefix("Value error, ")
    got = error.get("input")
    shown = "" if isinstance(got, (dict, BaseModel)) else f", got {got!r}"
    return f"{dotted}: {message[0].lower() + message[1:]}{shown if 'got' not in message else ''}"


def _fields_at(location: list[Any]) -> list[str]:
    """Names of the fields of the model that `location` leads to."""
    model: Any = Config
    for part in location:
        if isinstance(part, int) or model is None:
            continue
        if part not in model.model_fields:
            continue  # a union's member name
        model = _model_in(model.model_fields[part].annotation)
    return list(model.model_fields) if model is not None else []


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, Union, types.UnionType, Annotated):
        for arg in get_args(annotation):
            found = _model_in(arg)
            if found is not None:
                return found
    return None
