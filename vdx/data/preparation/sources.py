"""The files of footage of a folder, a list or a table, with their captions.

Nothing is left out in silence. Whatever is neither footage nor a caption of it is counted and
named. A caption that cannot be read leaves its file without one, and is counted too.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vdx.data.curation.caption import Caption
from vdx.data.folders import (
    HIDDEN,
    NO_VIDEO,
    REPEATED,
    UNUSABLE,
    describe_left_out,
    names_on_disk,
    nfc,
    stem,
    stored_name,
    stored_names,
    walk_folder,
)
from vdx.data.preparation.captions import (
    CAPTION_FILES,
    TABLES,
    read_caption,
    read_table,
)
from vdx.files import FileError
from vdx.text_files import read_lines

__all__ = ["SourceFile", "SourceList", "list_sources"]

BAD_CAPTION = "captions that cannot be read"
SEVERAL = "captions of files that have another one"
MISSING = "names of a list whose file is not there"
# The table of a folder that other tables do not replace.
METADATA = "metadata.jsonl"


class SourceFile(NamedTuple):
    """One file of footage."""

    name: str  # path relative to the folder, with / between folders
    path: Path
    caption: Caption


class SourceList(NamedTuple):
    """The files of footage, sorted by name, and the names of what is left out."""

    root: Path
    files: list[SourceFile]
    left_out: dict[str, list[str]]  # kind -> names

    def __str__(self) -> str:
        """Return one line with the number of files and of each kind that is left out."""
        captioned = sum(file.caption != Caption() for file in self.files)
        line = f"{self.root}: {len(self.files)} files, {captioned} of them with captions."
        return line + describe_left_out(self.left_out)


def list_sources(source: Path) -> SourceList:
    """Return the files of a folder, of a list of paths, or of a table.

    A list is a .txt file with a path a line; a table has the columns file_name and caption. Both
    name files relative to their own folder. Raises ValueError if there is no such place, or a
    table has a row that names no file.
    """
    if source.is_dir():
        return _from_folder(source)
    if not source.is_file():
        raise ValueError(f"There is no folder or file {source.resolve()}.")
    if source.suffix.lower() in TABLES:
        rows = read_table(source)
        if rows is None:
            raise ValueError(
                f"{source} names no files: its rows need a column file_name, and may have caption."
            )
        return _from_names(source.parent, rows)
    if source.suffix.lower() != ".txt":
        raise ValueError(
            f"{source} is no folder, and no list: expected .txt with a path a line, or one of "
            f"{' '.join(TABLES)} with the columns file_name and caption."
        )
    lines = [line.strip() for line in read_lines(source)]
    return _from_names(source.parent, [(line, None) for line in lines if line])


def _from_folder(root: Path) -> SourceList:
    """Return the files of a folder that are no captions."""
    walk = walk_folder(root)
    left_out: dict[str, list[str]] = {
        NO_VIDEO: [],
        BAD_CAPTION: [],
        SEVERAL: [],
        MISSING: [],
        HIDDEN: walk.hidden,
        REPEATED: walk.repeated,
        UNUSABLE: walk.unusable,
    }
    texts = {name for name in walk.files if _suffix(name) in {*CAPTION_FILES, *TABLES}}
    footage = [name for name in walk.files if name not in texts]
    captions = _own_captions(root, footage, texts, left_out)
    on_disk = stored_names(walk)

    # Tables complete what has no caption of its own; metadata.jsonl comes first.
    tables = sorted(name for name in texts if _suffix(name) in TABLES)
    for table in sorted(tables, key=lambda name: name != METADATA):
        for name, caption in _table_of(root, table, left_out):
            stored = stored_name(name, on_disk)
            if stored not in on_disk.values():
                left_out[MISSING].append(name)
            elif caption is not None:
                _add(captions, stored, Caption(caption.strip()), f"{table}: {name}", left_out)

    files = [SourceFile(name, root / name, captions.get(name, Caption())) for name in footage]
    return SourceList(root, files, left_out)


def _own_captions(
    root: Path, footage: Iterable[str], texts: set[str], left_out: Mapping[str, list[str]]
) -> dict[str, Caption]:
    """Return the captions in files that have the name of their video.

    The files are removed from `texts`; those that no video uses are counted, except tables.
    """
    by_stem: dict[str, list[str]] = {}
    for name in sorted(texts, key=lambda name: _preference(name)):
        if _suffix(name) in CAPTION_FILES:
            by_stem.setdefault(stem(name), []).append(name)

    captions: dict[str, Caption] = {}
    for name in footage:
        # `clip.mp4.txt` is as good as `clip.txt`.
        for text in (*by_stem.get(stem(name), ()), *by_stem.get(nfc(name), ())):
            texts.discard(text)
            try:
                caption = read_caption(root / text)
            except (FileError, OSError) as error:
                left_out[BAD_CAPTION].append(f"{text}: {error}")
            else:
                _add(captions, name, caption, text, left_out)
    left_out[NO_VIDEO].extend(sorted(name for name in texts if _suffix(name) not in TABLES))
    return captions


def _preference(name: str) -> tuple[int, str]:
    """Return the place of a caption file among those of one video."""
    return CAPTION_FILES.index(_suffix(name)) if _suffix(name) in CAPTION_FILES else 9, name


def _add(
    captions: dict[str, Caption],
    name: str,
    caption: Caption,
    where: str,
    left_out: Mapping[str, list[str]],
) -> None:
    """Set the caption of a file, unless it has another one already."""
    if captions.setdefault(name, caption) != caption:
        left_out[SEVERAL].append(where)


def _table_of(
    root: Path, table: str, left_out: Mapping[str, list[str]]
) -> list[tuple[str, str | None]]:
    """Return the rows of a table in a folder, with names relative to the folder.

    A table that cannot be read is counted, except metadata.jsonl, which raises FileError.
    """
    try:
        rows = read_table(root / table)
    except FileError as error:
        if table == METADATA:
            raise
        left_out[BAD_CAPTION].append(f"{table}: {error}")
        return []
    if rows is None:
        left_out[NO_VIDEO].append(table)
        return []
    folder = PurePosixPath(table).parent
    return [((folder / name).as_posix(), caption) for name, caption in rows]


def _from_names(root: Path, rows: Iterable[tuple[str, str | None]]) -> SourceList:
    """Return the files that a list or a table names; missing files stay in the list."""
    left_out: dict[str, list[str]] = {BAD_CAPTION: [], SEVERAL: []}
    paths: dict[str, Path] = {}
    captions: dict[str, Caption] = {}
    on_disk: Mapping[str, str] = {}
    for given, caption in rows:
        path = root / given
        if not path.exists():  # a list may have another Unicode form of a name
            on_disk = on_disk or names_on_disk(root)
            path = root / stored_name(given, on_disk)
        name = _relative(root, path)
        paths.setdefault(name, path)
        if caption is not None:
            _add(captions, name, Caption(caption.strip()), given, left_out)

    for name, path in paths.items():
        for suffix in CAPTION_FILES:
            text = path.with_suffix(suffix)
            if not text.is_file() or name in captions:
                continue
            try:
                captions[name] = read_caption(text)
            except (FileError, OSError) as error:
                left_out[BAD_CAPTION].append(f"{text}: {error}")
    files = [SourceFile(name, paths[name], captions.get(name, Caption())) for name in sorted(paths)]
    return SourceList(root, files, left_out)


def _relative(root: Path, path: Path) -> str:
    """Return the name of a path: relative to a folder if it is inside, else absolute."""
    whole = Path(os.path.normpath(path.absolute()))
    folder = Path(os.path.normpath(root.absolute()))
    if whole.is_relative_to(folder):
        return whole.relative_to(folder).as_posix()
    return whole.as_posix()


def _suffix(name: str) -> str:
    """Return the suffix of a name in lower case."""
    return PurePosixPath(name).suffix.lower()
