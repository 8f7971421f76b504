"""Objects from configs.

`build(spec, TABLE)` is the only place where a name becomes an object. A spec is a mapping `{"name":
row of the table, **fields}`. `fill` does the same for a section whose class is fixed. Both reject
unknown keys and wrong types and name the nearest known key, so that a typo in a config or on the
command line fails before anything is compiled.
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from vdx.config.ranges import MAX_FLOAT, Interval, Length, OneOf

T = TypeVar("T")
_FLAX_FIELDS = {"parent", "name"}
_MOST_QUOTED = 500  # characters of a wrong value in a message


class ConfigError(ValueError):
    """A config that has no meaning; the message says what to write instead."""


class _OutOfRange(ConfigError):
    """A value of the right type that a range or a choice excludes."""


def nearest(name: str, known: Iterable[Any]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


@functools.cache
def configurable_fields(cls: Any) -> dict[str, Any]:
    """Return the fields of a class that a config may set, with their types and ranges.

    cls: a dataclass or a flax module.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    if "parent" in names:  # a flax module, whose `parent` and `name` flax itself sets
        names = [name for name in names if name not in _FLAX_FIELDS]
    return {name: hints[name] for name in names}


def type_name(hint: Any) -> str:
    """Return how a type reads in a message, such as "int >= 1"."""
    if hint is Ellipsis:
        return "..."
    if hint is type(None):
        return "None"
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is Annotated:
        ranges = [str(limit) for limit in args[1:] if isinstance(limit, Interval | Length)]
        return " ".join([type_name(args[0]), *filter(None, ranges)])
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin in (types.UnionType, typing.Union):
        return " | ".join(map(type_name, args))
    name = getattr(origin or hint, "__name__", str(hint))
    return f"{name}[{', '.join(map(type_name, args))}]" if args else name


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Convert a value to the annotated type, and check its range.

    int becomes float and list becomes tuple, nothing else.
    """
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _check_limits(_convert(value, hint.__origin__, where), hint, where)
    if origin is Literal:
        return _choose(value, hint, where)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, hint, where)
    if origin is tuple and isinstance(value, list | tuple):
        args = typing.get_args(hint)
        if args[-1] is Ellipsis:
            args = args[:1] * len(value)
        if len(args) == len(value):
            return tuple(_convert(v, a, where) for v, a in zip(value, args, strict=True))
    elif isinstance(value, bool):  # a bool is an int to Python, not to a config
        if hint is bool:
            return value
    elif hint is float and isinstance(value, int | float):
        return _finite(value, where)
    elif isinstance(value, Mapping) and isinstance(value, origin or hint):
        of = (*typing.get_args(hint), Any, Any)[1]
        return {k: _convert(v, of, f"{where}.{k}") for k, v in value.items()}
    elif isinstance(value, origin or hint):
        return value
    raise _wrong_type(value, hint, where)


def _convert_union(value: Any, hint: Any, where: str) -> Any:
    """Convert a value to the first of several types that it fits."""
    errors = []
    for option in typing.get_args(hint):
        try:
            return _convert(value, option, where)
        except _OutOfRange as error:
            errors.append(error)
        except ConfigError:
            continue
    if len(errors) == 1:  # the one option whose type the value has
        raise errors[0]
    if errors:
        raise _out_of_range(value, hint, where)
    raise _wrong_type(value, hint, where)


def _check_limits(value: Any, hint: Any, where: str) -> Any:
    """Return a converted value that is inside every range of its annotation."""
    for limit in hint.__metadata__:
        if isinstance(limit, OneOf):
            _check_name(value, limit.names(), where)
        if isinstance(limit, Interval | Length) and value not in limit:
            raise _out_of_range(value, hint, where)
    return value


def _wrong_type(value: Any, hint: Any, where: str) -> ConfigError:
    given = f"{_quote(value)} is {type(value).__name__}"
    return ConfigError(f"{where} = {given}, expected {type_name(hint)}.")


def _out_of_range(value: Any, hint: Any, where: str) -> _OutOfRange:
    given = f"{_quote(value)} is out of range"
    return _OutOfRange(f"{where} = {given}, expected {type_name(hint)}.")


def _quote(value: Any) -> str:
    """Return a wrong value for a message, without the end of a long one."""
    text = repr(value)
    return text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}..."


def _choose(value: Any, hint: Any, where: str) -> Any:
    """Return a value that is one of the choices of a Literal."""
    choices = typing.get_args(hint)
    if type(value) not in map(type, choices):
        raise _wrong_type(value, hint, where)
    _check_name(value, choices, where)
    return value


def _check_name(name: Any, known: Iterable[Any], where: str) -> None:
    """Raise ConfigError for a name that is not known."""
    known = list(known)
    if name not in known:
        raise _OutOfRange(
            f"{where}: unknown name {name!r}.{nearest(name, known)} "
            f"Known: {', '.join(map(str, known))}."
        )


def _finite(value: float, where: str) -> float:
    """Return a number as float. Raises ConfigError unless float32 holds it."""
    if not abs(value) <= MAX_FLOAT:
        raise _OutOfRange(f"{where} = {_quote(value)} is not a finite number of float32.")
    return float(value)


def check_fields(instance: object, where: str = "") -> None:
    """Raise ConfigError for a field of a dataclass that its annotation excludes.

    For `__post_init__` of classes that programs build directly, without `fill`.
    """
    cls: Any = type(instance)
    for name, hint in configurable_fields(cls).items():
        _convert(getattr(instance, name), hint, f"{where or cls.__name__}.{name}")


def check_entries(values: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for an entry of a mapping that its type or range excludes.

    hints: key -> type, or the hints of a mapping below. Entries without a hint are not checked.
    """
    for key, hint in hints.items():
        if key not in values:
            continue
        if not isinstance(hint, Mapping):
            _convert(values[key], hint, f"{where}: {key}")
            continue
        _convert(values[key], dict, f"{where}: {key}")
        check_entries(values[key], hint, f"{where}: {key}")


def convert(
    cls: Callable[..., Any], spec: Mapping[str, Any], where: str, given: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the checked fields of the class `cls` in a section of a config.

    where: the section's dotted name, for messages. given: fields that the program supplies and
    the config may not set. Raises ConfigError for an unknown key, a wrong type, a value out of
    range or a missing key.
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
    return values


def fill(cls: Callable[..., T], spec: Mapping[str, Any], where: str, **given: Any) -> T:
    """Build the dataclass or module `cls` from a section; see `convert`."""
    return cls(**convert(cls, spec, where, given), **given)


def lookup(name: str, table: Mapping[str, T], where: str) -> T:
    """Return the row `name` of a table. Raises ConfigError that lists the rows."""
    _check_name(name, table, where)
    return table[name]


def build(
    spec: Mapping[str, Any], table: Mapping[str, Callable[..., T]], where: str, **given: Any
) -> T:
    """Build the object that a spec `{"name": ..., **fields}` names in a table."""
    row, fields = _row_of(spec, table, where)
    return fill(row, fields, where, **given)


def check_spec(
    spec: Mapping[str, Any], table: Mapping[str, Callable[..., Any]], where: str
) -> None:
    """Raise ConfigError for a spec that `build` would refuse; builds nothing."""
    row, fields = _row_of(spec, table, where)
    convert(row, fields, where)


def _row_of(
    spec: Mapping[str, Any], table: Mapping[str, Callable[..., T]], where: str
) -> tuple[Callable[..., T], dict[str, Any]]:
    """Return the row that a spec names in a table, and the fields that it gives."""
    if "name" not in spec:
        raise ConfigError(f"{where} lacks a name. Known: {', '.join(table)}.")
    row = lookup(spec["name"], table, where)
    return row, {key: value for key, value in spec.items() if key != "name"}
