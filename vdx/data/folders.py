"""Folders of videos: what is in them, what is left out and why, and their splits.

Folders behind links are read. Hidden files are not. A folder or video that links reach a second
time is read once, under its name without links. Whatever is left out is counted and named.
"""

import hashlib
import os
import unicodedata
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vdx.data.metadata import read_metadata
from vdx.data.track_files import TRACK_FILES
from vdx.data.video_files import is_video

__all__ = [
    "HIDDEN",
    "NO_CAPTION",
    "NO_VIDEO",
    "OTHER",
    "REPEATED",
    "UNUSABLE",
    "FolderListing",
    "VideoEntry",
    "Walk",
    "describe_left_out",
    "list_videos",
    "names_on_disk",
    "nfc",
    "stem",
    "stored_name",
    "stored_names",
    "validation_names",
    "walk_folder",
]

SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")  # as hidden as names with a dot
MAX_NAMED = 3  # names of each kind in a message

# Kinds of what is left out.
NO_CAPTION = "videos without a caption"
NO_CAPTION_IN_ROW = "rows without a caption"
NO_VIDEO = "captions without a video"
NO_ROW = "videos that no row names"
NO_FILE = "rows whose file is not there"
OTHER = "files of kinds that are not read"
HIDDEN = "hidden files and folders"
REPEATED = "files and folders that links reach twice"
UNUSABLE = "broken links, pipes, devices or folders that cannot be opened"


class VideoEntry(NamedTuple):
    """One video of a folder."""

    name: str  # path relative to the folder, with / between folders
    caption: Any  # the text, or the Path of a text file that contains it
    sha256: str | None = None  # 64 hex digits; None: not compared
    tracks: tuple[tuple[str, Any], ...] = ()  # (row of TRACK_FILES, file name)


class FolderListing(NamedTuple):
    """The videos of a folder, and the names of what is left out."""

    root: Path
    entries: list[VideoEntry]  # videos with captions
    left_out: dict[str, list[str]]  # kind -> names; rows of missing files are entries too

    def __str__(self) -> str:
        """Return one line with the number of videos and of each kind that is left out."""
        line = f"{self.root}: {len(self.entries)} videos with captions."
        return line + describe_left_out(self.left_out)


class Walk(NamedTuple):
    """Names below a folder, relative to it."""

    files: list[str]
    hidden: list[str]
    repeated: list[str]
    unusable: list[str]


def list_videos(root: Path) -> FolderListing:
    """Return the videos of a folder that have captions, and what is left out.

    They are the rows of `metadata.jsonl`, or else files with a text file of the same name.
    Raises ValueError if there is no folder, and for the first row that is not valid.
    """
    if not root.is_dir():
        raise ValueError(f"There is no folder {root.resolve()}.")
    walk = walk_folder(root)
    metadata = root / "metadata.jsonl"
    if os.path.lexists(metadata):
        return _from_rows(root, walk, read_metadata(metadata))
    return _from_text_files(root, walk)


def validation_names(names: Iterable[str], fraction: float) -> set[str]:
    """Return the names of the validation split.

    A name is in it if its hash, in [0, 1), is below `fraction`. Of two or more names at least the
    one with the smallest hash is in it, and the one with the largest is not. So neither side is
    empty, and in all but the smallest sets a clip stays on its side when others come or go.
    """
    hashes = {name: _hash(name) for name in names}
    if fraction == 0 or len(hashes) < 2:
        return set()
    ordered = sorted(hashes, key=lambda name: (hashes[name], name))
    below = sum(value < fraction for value in hashes.values())
    return set(ordered[: min(max(below, 1), len(ordered) - 1)])


def names_on_disk(root: Path) -> dict[str, str]:
    """Return the files of a folder: name, and its NFC form, -> name on the disk."""
    return stored_names(walk_folder(root))


def stored_name(name: str, on_disk: Mapping[str, str]) -> str:
    """Return the name on the disk; a list may have another Unicode form of it."""
    return on_disk.get(name) or on_disk.get(nfc(name), name)


def stored_names(walk: Walk) -> dict[str, str]:
    """Return names and their NFC forms -> names."""
    composed = {nfc(name): name for name in walk.files}
    return composed | {name: name for name in walk.files}


def nfc(name: str) -> str:
    """Return a name with composed characters; macOS also stores decomposed ones."""
    return unicodedata.normalize("NFC", name)


def _hash(name: str) -> float:
    """Return the hash of a name in [0, 1), the same for every Unicode form."""
    encoded = nfc(name).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest()) / 2**64


def walk_folder(root: Path) -> Walk:
    """Return what is below a folder, through links; each folder is entered once.

    Folders that are reached without a link come first, so that their names are kept.
    """
    walk = Walk([], [], [], [])
    real_root = root.resolve()
    folders = deque([""])
    links: deque[str] = deque()
    entered: set[Any] = set()

    while folders or links:
        name = (folders or links).popleft()
        try:
            # A link to a folder above the root contains the root again.
            is_above = bool(name) and real_root.is_relative_to((root / name).resolve())
            identity = _identity(root / name)
            if identity in entered or is_above:
                walk.repeated.append(name)
                continue
            entered.add(identity)
            with os.scandir(root / name) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            walk.unusable.append(name or ".")
            continue
        for entry in entries:
            path = f"{name}/{entry.name}" if name else entry.name
            _place(entry, path, walk, folders, links)

    walk.files.sort(key=lambda name: name.split("/"))
    return walk


def _place(
    entry: os.DirEntry[str], path: str, walk: Walk, folders: deque[str], links: deque[str]
) -> None:
    """Append a path to the list that it belongs into."""
    if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
        walk.hidden.append(path)
        return
    try:
        is_dir = entry.is_dir()
        is_file = entry.is_file()
    except OSError:  # a link to itself, or a target that may not be looked at
        is_dir = is_file = False

    if is_dir:
        (links if entry.is_symlink() else folders).append(path)
    elif is_file:
        walk.files.append(path)
    else:
        walk.unusable.append(path)


def _identity(path: Path) -> Any:
    """Return what all names of a file or folder have in common."""
    facts = path.stat()
    # Some file systems have no inode numbers.
    return (facts.st_dev, facts.st_ino) if facts.st_ino else path.resolve()


def _from_text_files(root: Path, walk: Walk) -> FolderListing:
    """Return the videos that have a text file of the same name."""
    # Captions by the name of their video, without suffix; of a.txt and a.TXT the first.
    captions = [name for name in walk.files if name.lower().endswith(".txt")]
    texts: dict[str, str] = {}
    for name in reversed(captions):
        texts.setdefault(stem(name), name)

    videos = [name for name in walk.files if is_video(root / name)]
    kept, repeated = _distinct(root, videos, texts)
    entries = [VideoEntry(name, root / texts[stem(name)]) for name in kept if stem(name) in texts]

    used = {texts[stem(name)] for name in videos if stem(name) in texts}
    left_out = {
        NO_CAPTION: [name for name in kept if stem(name) not in texts],
        NO_VIDEO: [name for name in captions if name not in used],
        OTHER: sorted({*walk.files} - {*videos} - {*captions}),
        HIDDEN: walk.hidden,
        REPEATED: walk.repeated + repeated,
        UNUSABLE: walk.unusable,
    }
    return FolderListing(root, entries, left_out)


def _distinct(
    root: Path, videos: list[str], texts: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Return the videos, each file under one name, and the other names of these files.

    A name with a caption is preferred, then one that is no link.
    """
    names: dict[Any, list[str]] = {}
    for name in videos:
        names.setdefault(_identity(root / name), []).append(name)

    def preference(name: str) -> tuple[bool, bool, str]:
        return stem(name) not in texts, os.path.islink(root / name), name

    best = {min(group, key=preference) for group in names.values()}
    return (
        [name for name in videos if name in best],
        [name for name in videos if name not in best],
    )


def _from_rows(root: Path, walk: Walk, rows: list[dict[str, Any]]) -> FolderListing:
    """Return the videos of the rows of `metadata.jsonl`.

    Rows of files that are not there stay, and are bad records when they are read.
    """
    on_disk = stored_names(walk)
    entries = [_entry(row, on_disk) for row in rows]
    captioned = [entry for entry in entries if entry.caption is not None]

    # Pipes and broken links that rows name are counted as such, and not as missing files too.
    unusable = {_location(root, name) for name in walk.unusable}
    countable = [
        entry
        for entry in entries
        if entry.name in on_disk or not unusable or _location(root, entry.name) not in unusable
    ]

    # Names that the walk does not have are missing, or lead through a link to what it has.
    named = {PurePosixPath(entry.name).as_posix() for entry in entries}
    named |= {file for entry in entries for _, file in entry.tracks if isinstance(file, str)}
    unknown = sorted(named - on_disk.keys())
    linked = {_identity(root / name) for name in unknown if os.path.isfile(root / name)}
    unnamed = [name for name in walk.files if name not in named and is_video(root / name)]
    if linked:
        unnamed = [name for name in unnamed if _identity(root / name) not in linked]

    left_out = {
        NO_CAPTION_IN_ROW: [entry.name for entry in countable if entry.caption is None],
        NO_FILE: [
            entry.name
            for entry in countable
            if entry.caption is not None and not _exists(root, entry.name, on_disk)
        ],
        NO_ROW: unnamed,
        HIDDEN: [name for name in walk.hidden if name not in named],
        REPEATED: walk.repeated,
        UNUSABLE: walk.unusable,
    }
    return FolderListing(root, captioned, left_out)


def _location(root: Path, name: str) -> str:
    """Return the one path that all names of a pipe or a broken link have in common."""
    path = root / name
    return nfc(str(path.parent.resolve() / path.name))


def _exists(root: Path, name: str, on_disk: Mapping[str, str]) -> bool:
    """Return true if a name of a list is a file."""
    return name in on_disk or os.path.isfile(root / name)


def _entry(row: Mapping[str, Any], on_disk: Mapping[str, str]) -> VideoEntry:
    """Return the entry of a row of `metadata.jsonl`.

    on_disk: names of files by themselves and by their NFC form, which a row may have.
    """

    def as_stored(name: Any) -> Any:
        return stored_name(name, on_disk) if isinstance(name, str) else name

    tracks = tuple(
        (name, as_stored(row[name])) for name in TRACK_FILES if row.get(name) is not None
    )
    return VideoEntry(as_stored(row["file_name"]), row.get("caption"), row.get("sha256"), tracks)


def stem(name: str) -> str:
    """Return a name without its suffix, in NFC."""
    return nfc(PurePosixPath(name).with_suffix("").as_posix())


def describe_left_out(left_out: Mapping[str, list[str]]) -> str:
    """Return a sentence with the number of names of each kind; "" if there are none."""
    kinds = [
        f"{len(names)} {kind} ({_list_names(names)})" for kind, names in left_out.items() if names
    ]
    return f" Not used: {'; '.join(kinds)}." if kinds else ""


def _list_names(names: list[str]) -> str:
    """Return the first MAX_NAMED names, and how many more there are."""
    listed = ", ".join(names[:MAX_NAMED])
    more = len(names) - MAX_NAMED
    return f"{listed} and {more} more" if more > 0 else listed
