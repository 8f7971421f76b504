"""Configs from the command line.

    --config=configs/NAME.py[:variant] --config.a.b=value ...

The flags of ml_collections refuse a key that the file does not spell out, even where the code
has a default for it. Here any key may be set. `vdx.experiment` then checks all of them against
the classes that they configure, and its errors name the nearest known key.
"""

import ast
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import CustomJSONEncoder

from vdx.config.build import ConfigError, nearest
from vdx.config.renamed import check_renamed_keys

WORDS = {"true": True, "false": False, "null": None}  # "none" is a name in several tables


def load_config(spec: str) -> ConfigDict:
    """Return the ConfigDict that `get_config(variant)` of a Python file returns.

    spec: "configs/NAME.py" or "configs/NAME.py:variant". Raises ConfigError if there is no such
    file, and for every error in it.
    """
    name, _, variant = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        known = sorted(str(p) for p in Path("configs").glob("*.py"))
        here = ", ".join(known) or "none"
        raise ConfigError(f"No config file {name!r}.{nearest(name, known)} Here are: {here}.")
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise ConfigError(f"{name} is not a Python file: expected a name such as configs/NAME.py.")
    module = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(path.resolve().parent.parent))  # `from configs import another`
    try:
        found.loader.exec_module(module)
        config = _call_get_config(module, name, variant)
    except ConfigError:
        raise
    except Exception as error:  # a config is the user's own code: any error in it is theirs
        raise ConfigError(f"{_place(error, path)}: {_describe(error)}") from error
    finally:
        sys.path.pop(0)
    config.unlock()
    return config


def _call_get_config(module: ModuleType, name: str, variant: str) -> ConfigDict:
    """Return the config of a module. Raises ConfigError if it has none."""
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(
            f"{name} has no function get_config(variant) that returns a ConfigDict: it is not a "
            "config."
        )
    if variant and not inspect.signature(get_config).parameters:
        raise ConfigError(f"{name} has no variants: write it without ':{variant}'.")
    config = get_config(variant) if variant else get_config()
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config of {name} returns {type(config).__name__}, expected ConfigDict."
        )
    return config


def _place(error: Exception, config: Path) -> str:
    """Return file and line of an error in a config, or in what it imports."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    lines = traceback.extract_tb(error.__traceback__)
    folder = config.resolve().parent
    inside = [one for one in lines if Path(one.filename).resolve().parent == folder]
    return f"{inside[-1].filename}, line {inside[-1].lineno}" if inside else str(config)


def _describe(error: Exception) -> str:
    """Return the message of an error, with its type unless it is a ValueError."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}."
    if type(error) is ValueError:
        return str(error)
    return f"{type(error).__name__}: {error}."


def parse_value(text: str) -> Any:
    """Parse a Python literal, true, false or null; anything else is a string."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the latter: ((((...
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
    resolved: dict[str, Any] = json.loads(_to_json(config, spec))
    check_renamed_keys(resolved)
    return resolved


def _to_json(config: ConfigDict, spec: str) -> str:
    """Return a config as JSON. Raises ConfigError for values of other kinds."""
    for key, value in _leaves(config, "config"):
        try:
            json.dumps(value, cls=CustomJSONEncoder)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{spec}: {key} is {type(value).__name__}; a config holds numbers, text, true, "
                "false, null, lists and sections of these."
            ) from error
    text: str = config.to_json()
    return text


def _leaves(config: ConfigDict, where: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in a config that is not a section."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{where}.{key}")
        else:
            yield f"{where}.{key}", value
