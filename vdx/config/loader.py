"""Configs from the command line: --config=configs/NAME.py[:variant] --config.a.b=value ...

The flags of ml_collections refuse a key that the file does not spell out, even where the code
has a default for it. Here any key may be set. `vdx.experiment` then checks all of them against
the classes that they configure, and its errors name the nearest known key.
"""

import ast
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vdx.config.build import ConfigError
from vdx.config.renamed import check_renamed_keys

WORDS = {"true": True, "false": False, "null": None}  # "none" is a name in several tables


def load_config(spec: str) -> ConfigDict:
    """Return the ConfigDict that `get_config(variant)` of a Python file returns.

    spec: "configs/NAME.py" or "configs/NAME.py:variant". Raises ConfigError if there is no such
    file.
    """
    name, _, variant = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        known = sorted(str(p) for p in Path("configs").glob("*.py"))
        raise ConfigError(f"No config file {name!r}. Here are: {', '.join(known) or 'none'}.")
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise ConfigError(f"{name} is not a Python file.")
    module = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(path.resolve().parent.parent))  # `from configs import another`
    try:
        found.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    config = module.get_config(variant) if variant else module.get_config()
    config.unlock()
    return config


def parse_value(text: str) -> Any:
    """Parse a Python literal, true, false or null; anything else is a string."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def override(config: ConfigDict, key: str, value: Any) -> None:
    """Set `a.b.c` and makes sections on the way; references in the config follow.

    Raises ConfigError where a section of the key is a value.
    """
    *sections, last = key.split(".")
    for section in sections:
        if section not in config or config[section] is None:
            config[section] = ConfigDict()
        config = config[section]
        if not isinstance(config, ConfigDict):
            raise ConfigError(f"--config.{key}: {section!r} is a value, not a section.")
    with config.ignore_type():  # `vdx.config.build.fill` says what type it must be
        config[last] = value


def is_override(arg: str) -> bool:
    """Return whether an argument sets a key of the config."""
    return arg.startswith("-") and arg.lstrip("-").startswith("config.")


def resolve(spec: str, argv: Sequence[str]) -> dict[str, Any]:
    """Resolve a config file and the overrides among `argv` to plain JSON values.

    Raises ConfigError for an override without a value, or a key that has a new name.
    """
    config = load_config(spec)
    for arg in filter(is_override, argv):
        key, equals, text = arg.lstrip("-").removeprefix("config.").partition("=")
        if not equals:
            raise ConfigError(f"Write {arg}=VALUE.")
        override(config, key, parse_value(text))
    resolved: dict[str, Any] = json.loads(config.to_json())
    check_renamed_keys(resolved)
    return resolved
