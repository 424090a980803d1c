"""Whether what a stage made is still what the config says, for the stages that build on it.

In: the config and a manifest. Out: nothing, or a FingerprintError that names what differs. A stage
compares its own folder with its own settings; this is for the settings that it shares with others.
"""

from typing import Any

from refscale.config import Config
from refscale.errors import FingerprintError
from refscale.storage.fingerprints import first_difference, model_fingerprint


def weights_of(config: Config) -> dict[str, Any]:
    """What identifies the reference model."""
    model = config.model
    return {
        "model": model_fingerprint(model.model_name_or_path, model.revision),
        "adapter": model.adapter and model_fingerprint(model.adapter, None),
    }


def require_encoding(config: Config, prepared: dict[str, Any]) -> None:
    """Refuse a corpus of other token ids than the config's.

    Raises:
        FingerprintError: Names the field.
    """
    stored = {"encoding": prepared["fingerprint"]["encoding"]}
    name, old, new = first_difference(stored, {"encoding": config.encoding.model_dump()})
    if name:
        raise FingerprintError(
            f"corpus/ was made with {name} = {old}, now it is {new}; set it back, or redo all from"
            " `refscale prepare --restart` on"
        )


def require_reference(config: Config, scored: dict[str, Any]) -> None:
    """Refuse sums of another model than the config's: DPO starts from the one that scored.

    Raises:
        FingerprintError: Names the file that differs.
    """
    weights = weights_of(config)
    stored = {name: scored["fingerprint"][name] for name in weights}
    name, old, new = first_difference(stored, weights)
    if name:
        raise FingerprintError(
            f"scores/ are those of another model: {name} was {old}, now it is {new}; set"
            " model.model_name_or_path back, or redo all from `refscale score --restart` on"
        )
