"""The reference of a config: every key with its type, default and meaning, as Markdown.

It is read from the classes that sections configure: the fields, their annotations and defaults,
and the comment on a field's line, or above it, in the class body.
"""

import dataclasses
import inspect
import io
import tokenize
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vdx.config.build import configurable_fields, type_name

__all__ = ["Section", "field_comments", "render"]


class Section(NamedTuple):
    """One heading of the reference: a class, or the rows of a table."""

    key: str  # dotted, such as "config.train"
    contents: Callable[..., Any] | Mapping[str, Callable[..., Any]]  # a class, or name -> class
    text: str = ""  # a sentence below the heading
    given: tuple[str, ...] = ()  # fields that the program supplies and a config may not set


def field_comments(cls: type) -> dict[str, str]:
    """Return {field: its comment} of a class and its bases.

    A comment is on the field's line, continued on comment lines below it, or on the lines above.
    """
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("vdx"):
            comments |= _comments_of(inspect.getsource(base), list(base.__annotations__))
    return comments


def _comments_of(source: str, fields: list[str]) -> dict[str, str]:
    """Return {field: comment} for annotated names of one class body."""
    lines = source.splitlines()
    by_line = {}
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(source)).readline):
        if token.type == tokenize.COMMENT:
            by_line[token.start[0] - 1] = token.string.lstrip("# ")
    found = {}
    for number, line in enumerate(lines):
        name = line.strip().partition(":")[0]
        if name not in fields or name in found:
            continue
        end = _last_line(lines, number)
        parts = _above(lines, by_line, number)
        parts += [by_line[i] for i in range(number, end + 1) if i in by_line]
        parts += _below(lines, by_line, end) if end in by_line else []
        found[name] = " ".join(parts)
    return found


def _last_line(lines: list[str], first: int) -> int:
    """Return the index of the last line of a field whose value spans several lines."""
    depth = 0
    for number in range(first, len(lines)):
        code = lines[number].partition("#")[0]
        depth += sum(code.count(c) for c in "([{") - sum(code.count(c) for c in ")]}")
        if depth <= 0:
            return number
    return first


def _above(lines: list[str], by_line: dict[int, str], number: int) -> list[str]:
    """Return the comment lines directly above a field that has none on its own line."""
    parts: list[str] = []
    if number in by_line:
        return parts
    number -= 1
    while number >= 0 and lines[number].strip().startswith("#"):
        parts.insert(0, by_line[number])
        number -= 1
    return parts


def _below(lines: list[str], by_line: dict[int, str], number: int) -> list[str]:
    """Return the comment lines that continue, further to the right, the comment of a field."""
    parts = []
    indent = len(lines[0]) - len(lines[0].lstrip()) + 4
    number += 1
    while number < len(lines) and lines[number].strip().startswith("#"):
        if len(lines[number]) - len(lines[number].lstrip()) <= indent:
            break
        parts.append(by_line[number])
        number += 1
    return parts


def render(title: str, sections: list[Section]) -> str:
    """Return the whole reference as Markdown."""
    blocks = [title.strip()]
    for section in sections:
        blocks.append(f"## `{section.key}`")
        if section.text:
            blocks.append(section.text)
        if isinstance(section.contents, Mapping):
            blocks += _table_of_rows(section)
        else:
            blocks.append(_table_of_fields(section.contents, section.given))
    return "\n\n".join(blocks) + "\n"


def _table_of_rows(section: Section) -> list[str]:
    """Return one block a row of a table: its name, its first sentence and its fields."""
    assert isinstance(section.contents, Mapping)
    blocks = []
    for name, row in section.contents.items():
        summary = _summary(row)
        blocks.append(f"**`{name}`**: {summary}" if summary else f"**`{name}`**")
        if dataclasses.is_dataclass(row) and _shown_fields(row, section.given):
            blocks.append(_table_of_fields(row, section.given))
    return blocks


def _summary(row: Any) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(row) or "").partition("\n")[0]


def _shown_fields(cls: Any, given: tuple[str, ...]) -> dict[str, Any]:
    """Return {field: type} of those that a config may set."""
    return {k: v for k, v in configurable_fields(cls).items() if k not in given}


def _table_of_fields(cls: Any, given: tuple[str, ...]) -> str:
    """Return the Markdown table of a class: key, type, default, meaning."""
    comments = field_comments(cls)
    defaults = {field.name: field for field in dataclasses.fields(cls)}
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, hint in _shown_fields(cls, given).items():
        cells = [f"`{name}`", _code(_short(hint)), _default(defaults[name]), comments.get(name, "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _short(hint: Any) -> str:
    """Return a type without the modules of its names."""
    text = type_name(hint)
    for prefix in ("collections.abc.", "typing."):
        text = text.replace(prefix, "")
    return text


def _code(text: str) -> str:
    return f"`{text}`"


def _default(field: dataclasses.Field) -> str:
    """Return a field's default as code, or "required"."""
    if field.default is not dataclasses.MISSING:
        return _code(repr(field.default))
    if field.default_factory is not dataclasses.MISSING:
        return _code(repr(field.default_factory()))
    return "required"
