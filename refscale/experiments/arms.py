"""The arms of a comparison: selections that a user names in a word.

In: `full`, `random:0.5`, `margin:largest:0.5:matched`. Out: an Arm, and the config of its run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from refscale.config import Config, SelectConfig
from refscale.errors import ConfigError
from refscale.selection.strategies import STRATEGIES
from refscale.storage.store import Store

FULL = "full"
RANDOM = "random"
_MATCHED = "matched"


@dataclass(frozen=True)
class Arm:
    """One selection of the grid.

    Attributes:
        text: As the user writes it; also its key in comparison.json.
        strategy: Of the selection; "mean_margin" for full, whose order does not matter.
        keep: largest, smallest or middle.
        fraction: Share of the training pairs.
        match_lengths: Whether lengths are matched, whatever the shared run's config says.
    """

    text: str
    strategy: str
    keep: str
    fraction: float
    match_lengths: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return self.text.replace(":", "-")

    @property
    def control(self) -> str | None:
        """The random arm of equal size; None for the full corpus and for random arms."""
        if self.text == FULL or self.strategy == RANDOM:
            return None
        return f"{RANDOM}:{self.fraction:g}"


def parse_arm(text: str) -> Arm:
    """An arm out of `full`, `random:FRACTION` or `STRATEGY:KEEP:FRACTION[:matched]`.

    Raises:
        ConfigError: It is none of these.
    """
    parts = text.strip().split(":")
    if parts == [FULL]:
        return Arm(FULL, "mean_margin", "largest", 1.0)
    if parts[0] == RANDOM and len(parts) == 2:
        parts = [RANDOM, "largest", parts[1]]
    keeps = ("largest", "smallest", "middle")
    matched = len(parts) == 4 and parts[0] != RANDOM and parts[3] == _MATCHED
    if len(parts) != 3 + matched or parts[0] not in STRATEGIES or parts[1] not in keeps:
        raise ConfigError(
            f"an arm is full, random:FRACTION or STRATEGY:KEEP:FRACTION[:{_MATCHED}] with a"
            f" strategy of {', '.join(STRATEGIES)} and keep {', '.join(keeps)}, got {text!r}"
        )
    try:
        fraction = float(parts[2])
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise ConfigError(f"an arm's fraction must be in (0, 1], got {parts[2]!r} in {text!r}")
    strategy, keep = parts[0], parts[1]
    if strategy == RANDOM:
        return Arm(f"{RANDOM}:{fraction:g}", strategy, keep, fraction)
    name = f"{strategy}:{keep}:{fraction:g}{f':{_MATCHED}' if matched else ''}"
    return Arm(name, strategy, keep, fraction, matched)


def grid(
    strategies: Sequence[str] = ("mean_margin", "margin", "length_adjusted_margin"),
    keeps: Sequence[str] = ("largest", "smallest"),
    fractions: Sequence[float] = (0.5, 0.3),
    *,
    match_lengths: bool = False,
) -> list[str]:
    """Every combination, with the controls: the full corpus, and random pairs of each size.

    With `match_lengths` every selection is `:matched`; the controls need none.
    """
    sizes = [f"{fraction:g}" for fraction in fractions]
    controls = [FULL, *(f"{RANDOM}:{size}" for size in sizes)]
    matched = [_MATCHED] if match_lengths else []
    return controls + [":".join([*parts, *matched]) for parts in product(strategies, keeps, sizes)]


def arm_config(config: Config, arm: Arm, seed: int) -> Config:
    """The config of one arm's run: its selection, its seed, all else as it was."""
    select = SelectConfig.model_validate(
        {
            "strategy": arm.strategy,
            "keep": arm.keep,
            "fraction": arm.fraction,
            "per_source": config.select.per_source,
            "match_lengths": arm.match_lengths,
            "beta": config.select.beta,
            "seed": seed if arm.strategy == RANDOM else 0,
        }
    )
    train = config.train.model_copy(update={"seed": seed})
    return config.model_copy(update={"select": select, "train": train})


def arm_folder(arm: Arm, seed: int) -> str:
    """Where an arm's run is, in the run that the arms share."""
    return f"arms/{arm.folder}/seed-{seed}"


def arm_store(store: Store, arm: Arm, seed: int) -> Store:
    """The store of an arm's run, from that of the run that the arms share."""
    return Store(store.uri_of(arm_folder(arm, seed)))
