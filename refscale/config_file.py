"""A config out of a YAML file: overrides of the command line, paths made absolute.

In: a path, `section.key=value` words. Out: a Config, or one ConfigError that names every defect.
Order of precedence: defaults, then the YAML file, then the words.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from refscale.config import Config, parse_config
from refscale.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans and floats: `on` is a word and 1e-5 a number. A key twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} occurs twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    "-+.0123456789",
)


def _parsed(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Read a YAML config and apply `section.key=value` overrides, whose values are YAML.

    Local source and model paths are made absolute: relative ones are relative to the config file.
    A path of a DeepSpeed config (train.deepspeed) is replaced by what the file holds.

    Raises:
        ConfigError: The file cannot be read or parsed, a key is unknown (the nearest is named) or
            a value is out of its range. One line per defect.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the config {path}: {exc}") from exc
    try:
        data = _parsed(text)
    except yaml.YAMLError as exc:
        where = getattr(exc, "problem_mark", None)
        at = f" at line {where.line + 1}" if where else ""
        raise ConfigError(f"{path} is not YAML{at}: {getattr(exc, 'problem', exc)}") from exc
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of sections, got {type(data).__name__}")
    base = Path(path).resolve().parent
    for override in overrides or []:
        if override.lstrip().startswith("train.deepspeed."):
            _read_deepspeed(data, base)  # of which it sets a key
        _apply_override(data, override)
    _read_deepspeed(data, base)
    config = parse_config(data, path)
    return _absolute_paths(config, base)


def explain_model_name(model_name_or_path: str, error: str) -> str:
    """`error` of loading a model, with what its name was taken for where no folder has it."""
    # Not by Path, which raises where a folder above may not be searched.
    if os.path.exists(model_name_or_path):
        return error
    if os.path.isabs(model_name_or_path):
        return f"model.model_name_or_path: folder {model_name_or_path} does not exist"
    return (
        f"{error}; there is no folder {model_name_or_path} beside the config, so it was taken for"
        " a hub id"
    )


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set needs section.key=value, got {override!r}")
    try:
        parsed = _parsed(value)
    except yaml.YAMLError as exc:
        raise ConfigError(f"--set {key}: {value!r} is not a YAML value") from exc
    parts = key.strip().split(".")
    node: Any = data
    for i, part in enumerate(parts[:-1]):
        if isinstance(node, list):
            node = _item(node, part, key)
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            where = ".".join(parts[: i + 1])
            raise ConfigError(
                f"--set {key}: {where} is {node!r} and has no keys; set {where} itself, for example"
                " to a mapping"
            )
    if isinstance(node, list):
        _item(node, parts[-1], key)
        node[int(parts[-1])] = parsed
    else:
        node[parts[-1]] = parsed
    # One size of a selection replaces another: an override need not null the config's own.
    sizes = ("fraction", "count", "threshold", "band")
    if (
        parts[0] == "select"
        and parts[-1] in sizes
        and isinstance(node, dict)
        and parsed is not None
    ):
        for other in sizes:
            if other != parts[-1]:
                node.pop(other, None)


def _item(items: list[Any], part: str, key: str) -> Any:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--set {key}: {part!r} is not an index below {len(items)}")
    return items[int(part)]


def _read_deepspeed(data: dict[str, Any], base: Path) -> None:
    """Put a DeepSpeed config that is named by its path into the section train itself."""
    train = data.get("train")
    if not isinstance(train, dict):
        return
    name = train.get("deepspeed")
    if not isinstance(name, str) or not (name.endswith(".json") or "/" in name):
        return  # a preset, or what the config refuses
    path = _absolute(name, base)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"train.deepspeed: {path} cannot be read as JSON: {exc}; give a preset such as zero2,"
            " or the path of a DeepSpeed config, relative to this config"
        ) from exc
    if not isinstance(found, dict):
        raise ConfigError(
            f"train.deepspeed: {path} must hold a JSON object, got {type(found).__name__}"
        )
    data["train"] = {**train, "deepspeed": found}


def _absolute(path: str, base: Path) -> str:
    if "://" in path or Path(path).is_absolute():
        return path
    return str(Path(path).expanduser() if path.startswith("~") else base / path)


def _absolute_paths(config: Config, base: Path) -> Config:
    def absolute(path: str) -> str:
        return _absolute(path, base)

    sources = [
        source.model_copy(update={"path": absolute(source.path)}) if source.path else source
        for source in config.corpus.sources
    ]
    model = config.model
    # A hub id looks like a relative path; it is one only if the folder is there.
    changes: dict[str, Any] = {}
    for key in ("model_name_or_path", "adapter", "chat_template"):
        value = getattr(model, key)
        if value is None:
            continue
        candidate = absolute(value)
        if key == "chat_template" or os.path.exists(candidate) or value.startswith((".", "~", "/")):
            changes[key] = candidate
    return config.model_copy(
        update={
            "corpus": config.corpus.model_copy(update={"sources": sources}),
            "model": model.model_copy(update=changes),
        }
    )
