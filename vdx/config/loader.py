"""Configs from the command line: --config=configs/NAME.py[:variant] --config.a.b=value ...

ml_collections' own flags refuse a key that the file does not spell out, even where the code
has a default for it. Here any key may be set, and `vdx.experiment` then checks all of them
against the classes they configure, with the nearest known key in the message.
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

WORDS = {"true": True, "false": False, "null": None}  # "none" is a name in several tables


def load_config(spec: str) -> ConfigDict:
    """The ConfigDict that `get_config(variant)` of a Python file returns."""
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
    """A Python literal, true, false or null; anything else is a string."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def override(config: ConfigDict, key: str, value: Any) -> None:
    """Sets `a.b.c`, making sections on the way; references in the config follow."""
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
    return arg.startswith("-") and arg.lstrip("-").startswith("config.")


def resolve(spec: str, argv: Sequence[str]) -> dict[str, Any]:
    """The config file `spec` with the overrides among `argv`, as plain JSON values."""
    config = load_config(spec)
    for arg in filter(is_override, argv):
        key, equals, text = arg.lstrip("-").removeprefix("config.").partition("=")
        if not equals:
            raise ConfigError(f"Write {arg}=VALUE.")
        override(config, key, parse_value(text))
    return json.loads(config.to_json())
