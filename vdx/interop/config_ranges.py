"""Ranges of the fields of makers' JSON files, checked where a file is read.

Each family lists the fields that it reads. Other fields have no effect, and are not checked. The
bounds are far above every published model: they keep a stranger's number from costing memory or
time before its disagreement with the arrays is found.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from vdx.config.build import check_entries
from vdx.config.ranges import Channels, Interval, Length, LevelBlocks
from vdx.files import read_json_object

__all__ = [
    "Blocks",
    "Channels",
    "Heads",
    "Layers",
    "Levels",
    "Names",
    "Pixels",
    "Places",
    "Vocabulary",
    "read_config",
]

Vocabulary = Annotated[int, Interval(1, 10_000_000)]  # tokens; UMT5 has 256,384
Heads = Annotated[int, Interval(1, 10_000)]  # of an attention, or features of one of them
Layers = Annotated[int, Interval(1, 1_000)]  # of a stack
Places = Annotated[int, Interval(1, 100_000)]  # positions of a table
Pixels = Annotated[int, Interval(1, 4_096)]  # along a side of an image or of a patch
Levels = Annotated[tuple[Channels, ...], Length(8)]  # widths of the levels
Blocks = LevelBlocks | Annotated[tuple[LevelBlocks, ...], Length(8)]  # of each level
Names = Annotated[tuple[str, ...], Length(8)]  # of the blocks of the levels


def read_config(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object in a maker's JSON file.

    fields: key -> its type and range, of the keys that are read; see `check_entries`. Raises
    ConfigError that names the file and the first key whose value is excluded, and what
    `read_json_object` raises.
    """
    config = read_json_object(path)
    check_entries(config, fields, str(path))
    return config
