"""What a run will take, before a GPU is taken: `refscale plan`.

In: the config, the lengths of its pairs, the model's config.json (no weights: the model is built on
torch's meta device) and the GPUs. Out: tokens, operations, GPU hours, memory of a scoring replica
and of a training worker at every ZeRO stage, and the cost at a price that the user gives. The GPUs
are taken to be reserved for the whole run, whether a stage uses all of them or not.

Every figure that is assumed rather than computed is an entry of `Sizing.assumptions`, printed with
its value. Seconds on a CPU; nothing is downloaded but, for a hub model, its config.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from refscale.config import Config
from refscale.config_file import load_config
from refscale.errors import ConfigError
from refscale.sizing.footprint import (
    COMPUTED_MFU,
    STAGES,
    Assumptions,
    Gpu,
    Memory,
    ModelShape,
    Replica,
    model_shape,
    parse_gpus,
    size_replica,
    worker_memory,
)
from refscale.sizing.lengths import Lengths, of_means, of_run, of_sources, read_means
from refscale.storage.store import Store
from refscale.training.checks import check_quantization
from refscale.training.presets import check_sections

_MOST_WORKERS = 1024
# Of training's operations: measuring the holdout meanwhile is worth a note from here on.
_MUCH_MEASURING = 0.2


@dataclass(frozen=True)
class Sizing:
    """The answer. `lines` is what the terminal shows, `as_dict` the same as JSON values.

    `flops`, `gpu_hours` and `hours` are by stage: `gpu_hours` of the GPUs that it uses, `hours` of
    the clock. With `train.eval_steps`, `measuring` is what training does on the holdout: it looks
    `measurements` times at `measured_pairs` pairs, `measured_tokens` in all. `assumptions` has the
    training MFU that was taken where none was given. `evaluation_replica` is None where it is as
    scoring's: it differs with `score.quantization`, as the policy is not quantised.
    """

    gpu: Gpu
    num_gpus: int
    lengths: Lengths
    model: ModelShape
    assumptions: Assumptions
    pairs: dict[str, int]
    flops: dict[str, float]
    gpu_hours: dict[str, float]
    hours: dict[str, float]
    gpus_per_replica: int
    replicas: int
    token_budget: int
    replica_memory: Memory
    evaluation_replica: Replica | None
    worker_memory: dict[str, Memory]
    workers_needed: dict[str, int | None]
    stage: str
    num_workers: int
    measurements: int
    measured_pairs: int
    measured_tokens: float
    notes: list[str] = field(default_factory=list)

    @property
    def reserved_gpu_hours(self) -> float:
        """Of all GPUs given, from the first stage to the last."""
        return self.num_gpus * sum(self.hours.values())

    @property
    def cost(self) -> float | None:
        """Of the reserved GPU hours at the price given; None without one."""
        price = self.assumptions.price_per_gpu_hour
        return None if price is None else price * self.reserved_gpu_hours

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = asdict(self)
        values["reserved_gpu_hours"], values["cost"] = self.reserved_gpu_hours, self.cost
        values["replica_memory"]["total"] = self.replica_memory.total
        if self.evaluation_replica is not None:
            total = self.evaluation_replica.memory.total
            values["evaluation_replica"]["memory"]["total"] = total
        for name, memory in self.worker_memory.items():
            values["worker_memory"][name]["total"] = memory.total
        return values

    def lines(self) -> list[tuple[str, str]]:
        """(name, value) lines."""
        length, found = self.lengths, []
        found.append(("GPUs", f"{self.num_gpus} x {self.gpu.name}, {self.gpu.memory_gib:g} GiB"))
        found.append(("lengths from", length.origin))
        for name, count in self.pairs.items():
            found.append((f"pairs, {name}", f"{count:,}"))
        # What predicts nothing, the last token of each side, is not computed either.
        shared = 1 - length.scoring.rows / (length.padded_tokens - 2 * length.num_pairs)
        found.append(
            ("tokens scored", f"{length.useful_tokens:,.0f} ({shared:.0%} saved by sharing)")
        )
        found.append(("parameters", f"{self.model.parameters:,}"))
        if self.model.trainable != self.model.parameters:
            found.append(("  of them trained", f"{self.model.trainable:,}"))
        for name, flops in self.flops.items():
            hours = f"{_hours(self.gpu_hours[name])} GPU hours, {_hours(self.hours[name])} h"
            if name == "measuring":
                hours += (
                    f"; {self.measurements:,} times {self.measured_pairs:,} held-out pairs in"
                    f" training, {self.measured_tokens:,.0f} tokens"
                )
            found.append((name, f"{flops:.3g} FLOP, {hours}"))
        reserved, used = _hours(self.reserved_gpu_hours), _hours(sum(self.gpu_hours.values()))
        clock = _hours(sum(self.hours.values()))
        found.append(("in all", f"{clock} h, {reserved} GPU hours reserved, {used} used"))
        memory = self.replica_memory
        found.append(
            (
                "scoring replica",
                f"{self.gpus_per_replica} GPU(s), {_gib(memory)}, {self.token_budget:,} tokens a"
                f" forward; {self.replicas} replica(s)",
            )
        )
        if (replica := self.evaluation_replica) is not None:
            found.append(
                (
                    "evaluation replica",
                    f"{replica.gpus} GPU(s), {_gib(replica.memory)}, {replica.token_budget:,}"
                    " tokens a forward; not quantised",
                )
            )
        for name, memory in self.worker_memory.items():
            needed = self.workers_needed[name]
            enough = f"from {needed} worker(s)" if needed else "does not fit at any number"
            chosen = " <- train.deepspeed" if name == self.stage else ""
            found.append((f"training, {name}", f"{_gib(memory)}; {enough}{chosen}"))
        if self.cost is not None:
            price = self.assumptions.price_per_gpu_hour
            found.append(("cost", f"{self.cost:,.2f} at {price:g} a reserved GPU hour"))
        for name, value in asdict(self.assumptions).items():
            if value is not None:
                found.append((f"assumed: {name}", f"{value:g}"))
        found.extend(("note", note) for note in self.notes)
        return found


def plan(
    config: Config,
    lengths: Lengths,
    *,
    gpus: str = "1xH100",
    assumptions: Assumptions | None = None,
    model: ModelShape | None = None,
) -> Sizing:
    """Size a run.

    Args:
        config: The run's config: selection, batch, ZeRO stage, workers, GPUs a replica.
        lengths: Of its pairs (refscale.sizing.lengths).
        gpus: Number and name, as `parse_gpus`.
        assumptions: Default: those of the class.
        model: Default: `model_shape(config)`.

    Raises:
        ConfigError: The model does not fit on the GPUs, the config has CPUs do the work, or `gpus`
            is malformed.
        ModelError: The model's config cannot be read.
    """
    assumed = assumptions or Assumptions()
    count, gpu = parse_gpus(gpus)
    _check_gpus(config, count)
    shape = model or model_shape(config)
    # Scoring and the evaluation compute in model.dtype, and training in what scored unless told.
    half = config.model.dtype in ("auto", "bfloat16", "float16")
    half_training = config.train.bf16
    if half_training is None:
        half_training = config.model.dtype in ("auto", "bfloat16")
    notes = [
        f"{cause}: the peak is that of fp32 without TF32"
        for cause, is_half in (
            (f"scoring in model.dtype {config.model.dtype}", half),
            ("training in float32", half_training),
        )
        if not is_half
    ]

    asked = config.ray.gpus_per_replica
    held = min(lengths.holdout_pairs, config.evaluate.max_pairs or lengths.holdout_pairs)

    def replica(quantization: str | None, asked: float | None) -> Replica:
        return size_replica(
            config, shape, gpu, count, assumed, half=half, quantization=quantization, asked=asked
        )

    def spread(replica: Replica) -> tuple[int, int, int]:
        """Replicas that fit, those that the run starts, and the GPUs that these take."""
        fit = int(count / replica.share)
        started = min(fit, config.ray.replica_bounds()[1])
        return fit, started, min(count, math.ceil(started * replica.share))

    scoring = replica(config.score.quantization, asked)
    _check_fits(scoring, gpu, asked)
    fit, replicas, scoring_gpus = spread(scoring)
    notes += _replica_notes(config, count, fit, scoring_gpus)
    if asked is None and scoring.gpus > 1:
        notes.append(
            f"a replica takes {scoring.gpus} GPUs and gets 1 where ray.gpus_per_replica is not set;"
            f" set ray.gpus_per_replica: {scoring.gpus}"
        )
    evaluation = scoring
    if config.score.quantization and held:
        evaluation = replica(None, scoring.share)
        if not evaluation.memory.fits:
            evaluation = replica(None, None)
            notes.append(_evaluation_note(evaluation))
    if max(scoring.gpus, evaluation.gpus) > 1:
        notes.append(
            "a replica of several GPUs works through its layers in turn: one GPU is busy at a time"
        )
    kept, kept_notes = _kept(config, lengths)
    notes += kept_notes
    steps, trained = _steps(config, lengths, kept)
    measurements = _measurements(config, steps) if held else 0
    work = _flops(config, shape, lengths, trained, held, measurements)
    notes += _measuring_notes(config, work, held, measurements)
    passes, computed_passes = _passes(config, shape)
    recomputed = computed_passes / passes
    training_mfu = assumed.training_mfu
    if training_mfu is None:
        padded = _tokens_in_training(config, lengths) / _packed_tokens(lengths)
        training_mfu = COMPUTED_MFU / (padded * recomputed)
        assumed = replace(assumed, training_mfu=training_mfu)
    peak, peak_training = (
        3600e12 * (gpu.bf16_tflops if is_half else gpu.fp32_tflops)  # operations an hour
        for is_half in (half, half_training)
    )
    scoring_rate = assumed.scoring_mfu * peak
    training_rate = training_mfu * peak_training
    rates = {
        "scoring": scoring_rate / scoring.gpus,
        "training": training_rate,
        # A forward alone is not computed again.
        "measuring": training_rate * recomputed,
        "evaluation": scoring_rate / evaluation.gpus,
    }
    gpu_hours = {name: flops / rates[name] for name, flops in work.items()}
    workers = min(config.train.num_workers, count)
    if workers < config.train.num_workers:
        notes.append(f"train.num_workers is {config.train.num_workers}, there are {count} GPUs")
    elif workers < count:
        notes.append(
            f"train.num_workers is {workers}: {count - workers} of {count} GPUs idle in training;"
            f" set train.num_workers: {count}, which makes a step's batch larger"
        )
    used = {
        "scoring": scoring_gpus,
        "training": workers,
        "measuring": workers,
        "evaluation": spread(evaluation)[2],
    }
    itemsize = 2 if half_training else 4
    if workers > 1:
        notes.append(
            "what training's GPUs send each other is not modelled: taken as hidden behind the"
            " computing, as over NVLink; over a slower network training takes longer"
        )

    def training(stage: str, number: int, config: Config = config) -> Memory:
        return worker_memory(config, shape, lengths.longest, gpu, number, stage, itemsize, assumed)

    def enough(stage: str) -> int | None:
        numbers = (2**i for i in range(_MOST_WORKERS.bit_length()))
        return next((n for n in numbers if training(stage, n).fits), None)

    asked_stage = config.train.deepspeed
    stage = "a config" if isinstance(asked_stage, dict) else asked_stage or "ddp"
    # ZeRO-3 does not partition quantised weights, and is refused with them.
    stages = [name for name in STAGES if not (config.score.quantization and "zero3" in name)]
    memories = {name: training(name, workers) for name in stages}
    needed = {name: enough(name) for name in stages}
    notes += _quantization_notes(config)
    if stage in memories and not memories[stage].fits:
        train = config.train.model_copy(update={"gradient_checkpointing": True})
        recomputing = training(stage, workers, config.model_copy(update={"train": train}))
        notes.append(_stage_note(stage, memories, needed[stage], workers, recomputing))
    return Sizing(
        gpu=gpu,
        num_gpus=count,
        lengths=lengths,
        model=shape,
        assumptions=assumed,
        pairs={"scored": lengths.num_pairs, "kept": kept, "holdout": lengths.holdout_pairs},
        flops=work,
        gpu_hours=gpu_hours,
        hours={name: hours / used[name] for name, hours in gpu_hours.items()},
        gpus_per_replica=scoring.gpus,
        replicas=replicas,
        token_budget=scoring.token_budget,
        replica_memory=scoring.memory,
        evaluation_replica=None if evaluation is scoring else evaluation,
        worker_memory=memories,
        workers_needed=needed,
        stage=stage,
        num_workers=workers,
        measurements=measurements,
        measured_pairs=held if measurements else 0,
        measured_tokens=measurements * held * _tokens_in_training(config, lengths),
        notes=notes,
    )


def size_run(
    config_path: str,
    overrides: list[str] | None = None,
    *,
    gpus: str = "1xH100",
    price: float | None = None,
    run_dir: str | None = None,
    num_pairs: int | None = None,
    lengths: str | None = None,
    scoring_mfu: float = Assumptions.scoring_mfu,
    training_mfu: float | None = Assumptions.training_mfu,
) -> Sizing:
    """What `refscale plan` does: lengths from the best source there is, then `plan`.

    Args:
        config_path: The run's config.
        overrides: `section.key=value`, as for `refscale run`.
        gpus: Number and name, for example 8xH100.
        price: Of a GPU hour, in any currency.
        run_dir: A run whose corpus is prepared: its lengths are used.
        num_pairs: Pairs of the corpus; needed with `lengths`.
        lengths: PROMPT,CHOSEN,REJECTED tokens on average; the sources are then not read.
        scoring_mfu: As in `Assumptions`.
        training_mfu: As in `Assumptions`.

    Raises:
        ConfigError: An argument is malformed, or the model does not fit.
        CorpusError: A source cannot be read.
        ModelError: The model's config cannot be read.
        StorageError: `run_dir` holds no prepared corpus.
    """
    config = load_config(config_path, overrides)
    parse_gpus(gpus)
    if num_pairs is not None and num_pairs < 1:
        raise ConfigError(f"--pairs must be a positive integer, got {num_pairs}")
    if lengths is not None:
        if num_pairs is None:
            raise ConfigError("--lengths says nothing of how many pairs there are; add --pairs")
        found = of_means(
            num_pairs,
            *read_means(lengths),
            holdout_fraction=config.corpus.holdout_fraction,
            max_length=config.encoding.max_length,
        )
        if any(source.holdout is not None for source in config.corpus.sources):
            found = replace(found, origin=f"{found.origin}; no source's own holdout is counted")
    elif run_dir is not None:
        found = of_run(Store(run_dir))
        found = found.scaled_to(num_pairs) if num_pairs else found
    else:
        found = of_sources(config, num_pairs=num_pairs)
    assumed = Assumptions(scoring_mfu, training_mfu, price_per_gpu_hour=price)
    return plan(config, found, gpus=gpus, assumptions=assumed)


def _kept(config: Config, lengths: Lengths) -> tuple[int, list[str]]:
    """Pairs that the selection keeps of the training split, and what is not certain of it."""
    train = lengths.num_pairs - lengths.holdout_pairs
    select = config.select
    if select.count is not None:
        if not select.per_source:
            return min(select.count, train), []
        sources = sum(source.holdout is not True for source in config.corpus.sources)
        note = (
            f"select.count is {select.count:,} of each of {sources} source(s); select refuses it"
            " where a source has fewer training pairs"
        )
        return min(select.count * sources, train), [note]
    if select.band is not None:
        return round((select.band[1] - select.band[0]) * train), []
    if select.fraction is not None:
        return round(select.fraction * train), []
    return train, ["select.threshold: how many pairs it keeps is not known; all are assumed"]


def _replica_notes(config: Config, count: int, fit: int, used: int) -> list[str]:
    """What to say where ray.replicas and the GPUs do not match."""
    least, most = config.ray.replica_bounds()
    if least > fit:
        return [f"ray.replicas asks for {least}, {fit} fit(s) on {count} GPUs"]
    if used < count and fit > most:
        of = "" if least == most else ".max"
        return [
            f"ray.replicas{of} is {most}: {count - used} of {count} GPUs idle in scoring; set"
            f" ray.replicas{of}: {fit}"
        ]
    return []


def _check_gpus(config: Config, count: int) -> None:
    """Refuse to size what CPUs do, and a replica of more GPUs than there are."""
    replica, worker = config.ray.gpus_per_replica, config.ray.gpus_per_worker
    for name, gpus, what in (
        ("gpus_per_replica", replica, "scoring and the evaluation"),
        ("gpus_per_worker", worker, "training"),
    ):
        if gpus == 0:
            raise ConfigError(
                f"ray.{name} is 0: CPUs do {what}, which plan does not size; to size GPUs, set"
                f" ray.{name}: 1"
            )
    if replica is not None and replica > count:
        raise ConfigError(
            f"ray.gpus_per_replica is {replica:g} and --gpus has {count}; lower the one or raise"
            " the other"
        )


def _check_fits(scoring: Replica, gpu: Gpu, asked: float | None) -> None:
    """Refuse a scoring replica that does not fit."""
    if scoring.memory.fits:
        return
    ways = "give more or larger GPUs"
    if asked is not None:
        ways = "raise ray.gpus_per_replica, or give larger GPUs"
    have = f"have {gpu.memory_gib:g}"
    if scoring.share < 1:
        have += f" for {int(1 / scoring.share)} replica(s)"
    raise ConfigError(
        f"a scoring replica needs {scoring.memory.total:.1f} GiB on each of {scoring.gpus}"
        f" {gpu.name}, which {have}; {ways}"
    )


def _evaluation_note(replica: Replica) -> str:
    """What the evaluation takes, whose policy is not quantised and so larger than what scored."""
    if not replica.memory.fits:
        return (
            "the evaluation does not fit: it loads the policy unquantised,"
            f" {replica.memory.total:.1f} GiB on each of {replica.gpus} GPU(s), which have"
            f" {replica.memory.capacity:g}; give more or larger GPUs"
        )
    return (
        f"the evaluation loads the policy unquantised, for which a replica takes {replica.gpus}"
        f" GPU(s); evaluate with --set ray.gpus_per_replica={replica.gpus}"
    )


def _quantization_notes(config: Config) -> list[str]:
    """That training refuses the quantised base, which scoring alone takes."""
    if config.score.quantization is None:
        return []
    train = config.train.model_dump()
    try:
        if isinstance(train["deepspeed"], dict):
            check_sections(train["deepspeed"])
        check_quantization(config.score.quantization, train)
    except ConfigError as exc:
        return [f"training refuses this: {exc}"]
    return []


def _stage_note(
    stage: str, memories: dict[str, Memory], needed: int | None, workers: int, recomputing: Memory
) -> str:
    """That train.deepspeed does not fit, and what would; `recomputing`: with checkpointing."""
    memory = memories[stage]
    fitting = [name for name, other in memories.items() if other.fits and name != "ddp"]
    checkpointing = f"train.gradient_checkpointing: true ({recomputing.total:.1f} GiB)"
    ways = [checkpointing] if recomputing.fits else []
    ways += [f"train.num_workers: {needed} with as many GPUs"] if needed else []
    ways += [f"train.deepspeed: {fitting[0]}"] if fitting else []
    ways = ways or ["a smaller micro-batch"]
    if not recomputing.fits and recomputing.total < memory.total:
        ways[-1] += f"; {checkpointing} is not enough alone"
    return (
        f"{stage} does not fit: {memory.total:.1f} GiB on each of {workers} GPU(s), which have"
        f" {memory.capacity:g}; {' or '.join(ways)}"
    )


def _measuring_notes(
    config: Config, work: dict[str, float], held: int, measurements: int
) -> list[str]:
    """That the holdout is measured for more than a small share of training's work."""
    share = work.get("measuring", 0.0) / work["training"] if work["training"] else 0.0
    if share <= _MUCH_MEASURING:
        return []
    fewer = max(1, int(held * _MUCH_MEASURING / share))
    return [
        f"train.eval_steps is {config.train.eval_steps}: training measures {held:,} held-out pairs"
        f" {measurements:,} time(s), {share:.0%} of its own operations; raise it, or set"
        f" evaluate.max_pairs: {fewer}, which bounds the evaluation too"
    ]


def _tokens_in_training(config: Config, lengths: Lengths) -> float:
    """Of a pair, on average, as training computes it."""
    if config.train.packed == "off":
        return lengths.padded_tokens / lengths.num_pairs
    return _packed_tokens(lengths)


def _packed_tokens(lengths: Lengths) -> float:
    """Of a pair on its own, on average, with each side's last token, which is not computed."""
    return lengths.alone.rows / lengths.num_pairs + 2


def _steps(config: Config, lengths: Lengths, kept: int) -> tuple[int, float]:
    """Optimizer steps of the training, and the pairs that they take."""
    train = config.train
    batch = float(train.per_device_train_batch_size)
    if train.token_budget:
        batch = max(1.0, train.token_budget / _tokens_in_training(config, lengths))
    batch *= train.gradient_accumulation_steps * train.num_workers
    if train.max_steps > 0:
        return train.max_steps, train.max_steps * batch
    steps = math.ceil(train.num_train_epochs * math.ceil(kept / batch))
    return steps, kept * train.num_train_epochs


def _measurements(config: Config, steps: int) -> int:
    """How often training measures the holdout: every eval_steps, and after the last step."""
    every, trl = config.train.eval_steps, config.train.trl
    if every is None or not steps:
        return 0
    delay = trl.get("eval_delay") or 0
    measured = [step for step in (*range(every, steps, every), steps) if step >= delay]
    return len(measured) + bool(trl.get("eval_on_start"))


def _flops(
    config: Config,
    shape: ModelShape,
    lengths: Lengths,
    trained: float,
    held: int,
    measurements: int,
) -> dict[str, float]:
    """Useful operations by stage; kept and held-out pairs are as long as all others.

    Training and evaluating count each pair on its own: what prompts have in common is computed for
    every micro-batch.
    """
    scoring, alone = (
        shape.flops(work.rows, work.head_rows, work.context)
        for work in (lengths.scoring, lengths.alone)
    )
    pair = alone / lengths.num_pairs
    passes, _ = _passes(config, shape)
    # A measurement is a forward of the policy alone.
    measuring = {"measuring": measurements * held * pair} if measurements else {}
    return {
        "scoring": scoring,
        "training": trained * pair * passes,
        **measuring,
        "evaluation": held * pair,
    }


def _passes(config: Config, shape: ModelShape) -> tuple[int, int]:
    """What a training step costs in forwards: the useful ones, and those that it computes.

    Backward costs one for the inputs' gradients and one for the weights', which the frozen ones of
    LoRA do not have; checkpointing computes one more; there is no reference pass at all.
    """
    useful = 3 if shape.trainable == shape.parameters else 2
    return useful, useful + config.train.gradient_checkpointing


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _gib(memory: Memory) -> str:
    shown = {name: value for name, value in memory.parts.items() if value >= 0.05}
    parts = ", ".join(f"{name} {value:.1f}" for name, value in shown.items())
    verdict = "" if memory.fits else " DOES NOT FIT"
    return f"{memory.total:.1f} GiB of each GPU ({parts}){verdict}"
