"""Secrets stay out of configs: what a config holds is shown in run folder, report and job info.

In: a resolved config and a run folder's URI. Out: nothing, or a refusal that names the field and
never the value.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from refscale.config import Config
from refscale.errors import ConfigError

_SECRET_KEY = re.compile(
    r"^(hub_)?token$|secret|passw(or)?d|api_?key|access_?key|credential", re.IGNORECASE
)
# Of signed addresses. Not all that says credential: Arrow's credential_kind names no secret.
_SECRET_QUERY = re.compile(
    r"^sig$|signature|token$|secret|passw(or)?d|key|^x-(amz|goog)-credential$", re.IGNORECASE
)
# The user part is the name of a container: abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/path
_CONTAINER_SCHEMES = ("abfs", "abfss")


def refuse_secrets(config: Config, run_dir: str) -> None:
    """Refuse what would show a secret in job info, run folder or report.

    Raises:
        ConfigError: A URI carries credentials, or a free-form section holds a key that names one.
    """
    uris = [("--run-dir", run_dir)]
    for name, value in _leaves(config.model_dump(mode="json")):
        if isinstance(value, str) and "://" in value:
            uris.append((name, value))
        if isinstance(value, str) and value and _SECRET_KEY.search(name.rpartition(".")[2]):
            raise ConfigError(
                f"{name} holds a secret, which job info and run folder would show; put it into the"
                " environment of the nodes (HF_TOKEN, WANDB_API_KEY, …) and leave the key out"
            )
    for name, uri in uris:
        found = _credentials(uri)
        if found:
            raise ConfigError(
                f"{name} is a URI with credentials in it ({found}), which job info and run folder"
                " would show; use an instance profile, a service account or variables such as"
                " AWS_* or AZURE_* on the nodes"
            )


def _credentials(uri: str) -> str | None:
    """What of a URI is secret, in words without its value; None where nothing is."""
    if "://" not in uri:
        return None
    parts = urlsplit(uri)
    if parts.password:
        return "a password"
    if parts.username and parts.scheme not in _CONTAINER_SCHEMES:
        return "a user"
    keys = [key for key, _ in parse_qsl(parts.query) if _SECRET_QUERY.search(key)]
    return f"the query's {keys[0]}" if keys else None


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{prefix}.{i}")
    else:
        yield prefix, value
