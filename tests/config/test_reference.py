"""docs/config.md is what the classes say, and every key has a meaning."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest

from vdx.config.reference import Section, field_comments, render
from vdx.reference import SECTIONS, TITLE

ROOT = Path(__file__).parents[2]
# (section, class) of everything that a config can fill.
CLASSES = [
    (section, row)
    for section in SECTIONS
    for row in (
        section.contents.values() if isinstance(section.contents, Mapping) else [section.contents]
    )
]


def test_the_page_is_current():
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == render(TITLE, SECTIONS), "run python -m vdx.reference --out=docs/config.md"


@pytest.mark.parametrize(("section", "row"), CLASSES, ids=lambda x: getattr(x, "__name__", ""))
def test_every_key_has_a_meaning(section, row):
    if not dataclasses.is_dataclass(row):
        pytest.fail(f"{row} of {section.key} is no dataclass: its keys cannot be listed")
    comments = field_comments(row)
    given = {"parent", "name", *section.given} if "parent" in row.__dataclass_fields__ else set()
    fields = {f.name for f in dataclasses.fields(row) if f.init} - given - set(section.given)
    assert not [name for name in fields if not comments.get(name)]


def test_comments_are_found_wherever_they_stand():
    comments = field_comments(Section)
    assert comments["key"] == 'dotted, such as "config.train"'
    assert comments["given"].startswith("fields that the program supplies")
