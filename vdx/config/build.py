"""Objects from configs: `build(spec, TABLE)` is the only place where a name becomes an object.

A spec is a mapping `{"name": row of the table, **fields}`. `fill` does the same for a section
whose class is fixed. Both reject unknown keys and wrong types and name the nearest known key, so
that a typo in a config or on the command line fails before anything is compiled.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_FLAX_FIELDS = {"parent", "name"}


class ConfigError(ValueError):
    """A config that has no meaning; the message says what to write instead."""


def nearest(name: str, known: Iterable[Any]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def configurable_fields(cls: Any) -> dict[str, Any]:
    """Return the fields of a dataclass or flax module that a config may set, with their types."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    if "parent" in names:  # a flax module, whose `parent` and `name` flax itself sets
        names = [name for name in names if name not in _FLAX_FIELDS]
    return {name: hints[name] for name in names}


def type_name(hint: Any) -> str:
    """Return how a type reads in a message, such as "int" or "tuple[float, ...]"."""
    return str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Convert a value to the annotated type: int to float and list to tuple, nothing else."""
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        for option in typing.get_args(hint):
            try:
                return _convert(value, option, where)
            except ConfigError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        args = typing.get_args(hint)
        if args[-1] is Ellipsis:
            args = args[:1] * len(value)
        if len(args) == len(value):
            return tuple(_convert(v, a, where) for v, a in zip(value, args, strict=True))
    elif isinstance(value, bool):  # a bool is an int to Python, not to a config
        if hint is bool:
            return value
    elif hint is float and isinstance(value, int | float):
        return float(value)
    elif isinstance(value, origin or hint):
        return dict(value) if isinstance(value, Mapping) else value
    raise ConfigError(f"{where} = {value!r} is {type(value).__name__}, expected {type_name(hint)}.")


def fill(cls: Callable[..., T], spec: Mapping[str, Any], where: str, **given: Any) -> T:
    """Build the dataclass or module `cls` from a section of a config.

    where: the section's dotted name, for messages. given: fields that the program supplies and
    the config may not set. Raises ConfigError for an unknown key, a wrong type or a missing key.
    """
    hints = configurable_fields(cls)
    allowed = [key for key in hints if key not in given]

    values = {}
    for key, value in spec.items():
        if key not in allowed:
            raise ConfigError(
                f"Unknown key {where}.{key}.{nearest(key, allowed)} "
                f"Known keys: {', '.join(allowed) or 'none'}."
            )
        values[key] = _convert(value, hints[key], f"{where}.{key}")

    required = {
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = [key for key in allowed if key in required and key not in values]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}.")
    return cls(**values, **given)


def lookup(name: str, table: Mapping[str, T], where: str) -> T:
    """Return the row `name` of a table. Raises ConfigError that lists the rows."""
    if name not in table:
        raise ConfigError(
            f"{where}: unknown name {name!r}.{nearest(name, table)} "
            f"Known: {', '.join(map(str, table))}."
        )
    return table[name]


def build(
    spec: Mapping[str, Any], table: Mapping[str, Callable[..., T]], where: str, **given: Any
) -> T:
    """Build the object that a spec `{"name": ..., **fields}` names in a table."""
    if "name" not in spec:
        raise ConfigError(f"{where} lacks a name. Known: {', '.join(table)}.")
    row = lookup(spec["name"], table, where)
    fields = {key: value for key, value in spec.items() if key != "name"}
    return fill(row, fields, where, **given)
