"""Where clips come from: drawn scenes, a folder of videos, or prepared records.

A source is a frozen dataclass of plain fields with `len()` and `source[i]`, which gives a
Record, or a dict where the example is ready (cached latents). To add one, write the class and
a row of SOURCES. A single file that cannot be used raises BadRecord when it is read; a data set
that is not there, or holds nothing, raises ValueError when the source is made.
"""

import dataclasses
import functools
import hashlib
import io
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from vdx.data.record import BadRecord, Record, frame_index_at
from vdx.data.records import check_classes, ready_example
from vdx.data.scenes.source import Scenes
from vdx.data.track_files import TRACK_FILES
from vdx.data.video_files import VIDEOS, Opener, guard, video_record

__all__ = [
    "SOURCES",
    "Records",
    "VideoFolder",
    "list_videos",
    "read_metadata",
]

SHA256 = re.compile("[0-9a-f]{64}")
SPLITS = ("all", "train", "validation")


def _is_validation(name: str, share: float) -> bool:
    """Depends on the name alone, so a clip never changes sides when others are added."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


class VideoEntry(NamedTuple):
    """A video of a folder. A caption that is a Path is in that text file. tracks: (name, file) of
    what steers it."""

    name: str
    caption: Any
    sha256: str | None = None
    tracks: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class VideoFolder:
    """Video files with captions.

    path: a folder with `metadata.jsonl`, rows {"file_name", "caption"} and perhaps "sha256" and
      files of what steers the clip, under the keys of `vdx.data.track_files` (other keys are
      ignored), or else videos that have a caption in a `.txt` file of the same name.
    split: "all", "train" or "validation"; validation_fraction: the share of the files, by a hash of
      the name.

    Most damage to an encoded video decodes to other pixels without a sign. A file with "sha256",
    which `python -m vdx.data.checksums` writes, is compared with it whenever it is opened.

    Names must stay inside the folder. Links are followed wherever they lead: downloads are often
    folders of links into a cache, and a list of names cannot make one.
    """

    path: str
    split: str = "all"
    validation_fraction: float = 0.1
    rows: tuple[VideoEntry, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        root = Path(self.path)
        if self.split not in SPLITS:
            raise ValueError(f"split = {self.split!r} is none of {', '.join(SPLITS)}.")
        rows = list_videos(root)
        if not rows:
            raise ValueError(
                f"No videos in {root.resolve()}: looked for rows in metadata.jsonl, "
                f"then for {' '.join(VIDEOS)} files with a .txt of the same name."
            )
        kept = [
            row
            for row in rows
            if self.split == "all"
            or _is_validation(row.name, self.validation_fraction) == (self.split == "validation")
        ]
        if not kept:
            raise ValueError(
                f"None of the {len(rows)} videos of {root} is in the split "
                f"{self.split!r} with validation_fraction = {self.validation_fraction}."
            )
        object.__setattr__(self, "rows", tuple(kept))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        name, caption, sha256, beside = self.rows[index]
        path = Path(self.path).absolute() / name  # a bare "x:y" would be an address to FFmpeg
        guard(name, _check_file, path)
        if isinstance(caption, Path):
            caption = guard(name, functools.partial(caption.read_text, encoding="utf-8")).strip()
        opener: Opener = lambda: str(path)
        if sha256 is not None:
            data = guard(name, _verified, path, sha256)
            opener = lambda: io.BytesIO(data)
        record = video_record(name, caption, opener)
        return dataclasses.replace(
            record,
            tracks={
                track: functools.partial(self._read, record, track, file) for track, file in beside
            },
        )

    def _read(self, record: Record, track: str, file: Any, times: np.ndarray) -> np.ndarray:
        """A track, from its file; its faults are the record's, and name the file."""

        def read() -> np.ndarray:
            if not isinstance(file, str) or not _stays_inside(file):
                raise ValueError("expected the name of a file inside the folder, / between folders")
            path, stamps = Path(self.path).absolute() / file, record.timestamps
            assert stamps is not None  # of a video
            _check_file(path)
            video = lambda: video_record(file, "", lambda: str(path)).read(times)
            return TRACK_FILES[track](path, frame_index_at(stamps, times), len(stamps), video)

        return guard(record.key, read, what=f"{track} {file!r}")


def _check_file(path: Path) -> None:
    """A pipe that came with a data set would never open, a device never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file")


def _verified(path: Path, sha256: str) -> bytes:
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"its SHA-256 is {found[:12]}..., metadata.jsonl says {sha256[:12]}...")
    return data


def list_videos(root: Path) -> list[VideoEntry]:
    """The videos that `metadata.jsonl` names, or those that have a text file beside them.

    Raises ValueError if there is no folder, or for the first row that cannot be meant.
    """
    if not root.is_dir():
        raise ValueError(f"There is no folder {root.resolve()}.")
    if (root / "metadata.jsonl").exists():
        return [
            VideoEntry(
                row["file_name"],
                row.get("caption"),
                row.get("sha256"),
                tuple((k, row[k]) for k in TRACK_FILES if row.get(k) is not None),
            )
            for row in read_metadata(root / "metadata.jsonl")
        ]
    videos = sorted(p for p in root.rglob("*") if p.suffix.lower() in VIDEOS)
    texts = [p.with_suffix(".txt") for p in videos]
    if not any(t.exists() for t in texts):
        return []
    return [
        VideoEntry(v.relative_to(root).as_posix(), t if t.exists() else None)
        for v, t in zip(videos, texts, strict=True)
    ]


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metadata.jsonl`; raises ValueError for the first that cannot be meant."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}. The line is {line[:80]!r}.") from None
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(
                f'{where} has no "file_name": {line[:80]!r}. A row reads '
                '{"file_name": "clip.mp4", "caption": "what it shows"}.'
            )
        if not _stays_inside(name):
            raise ValueError(
                f"{where}: {name!r} leaves the folder; name files inside it, with / "
                "between folders."
            )
        sha256 = row.get("sha256")
        if sha256 is not None and not (isinstance(sha256, str) and SHA256.fullmatch(sha256)):
            raise ValueError(
                f'{where}: "sha256" is {sha256!r}, expected 64 of 0-9 a-f. Remove it, '
                "and let `python -m vdx.data.checksums` write it."
            )
        rows.append(row)
    return rows


def _stays_inside(name: str) -> bool:
    """On every system: what is a plain name here may be a path or a drive elsewhere."""
    return not (
        PurePosixPath(name).is_absolute()
        or ".." in PurePosixPath(name).parts
        or "\\" in name
        or "\0" in name
        or PureWindowsPath(name).drive
    )


@dataclasses.dataclass(frozen=True)
class Records:
    """A directory that tensorflow_datasets prepared in the ArrayRecord format.

    path: the directory with `features.json`; `vdx.data.records` says what the features may be:
      mp4 bytes with captions, which give Records, or cached latents, which give examples.
    """

    path: str
    split: str = "train"
    rows: Any = dataclasses.field(init=False, repr=False)
    metadata: dict = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        if not (Path(self.path) / "features.json").exists():
            raise ValueError(
                f"{Path(self.path).resolve()} holds no features.json: it is not a "
                "directory that TFDS prepared."
            )
        check_classes(Path(self.path))
        import tensorflow_datasets as tfds  # a second of import, which other sources spare

        builder = tfds.builder_from_directory(self.path)
        if self.split not in builder.info.splits:
            raise ValueError(
                f"{self.path} has no split {self.split!r}; it has {', '.join(builder.info.splits)}."
            )
        known = set(builder.info.features)
        if not known >= {"video", "caption"} and not known >= {"latents", "text"}:
            raise ValueError(
                f"{self.path} has the features {', '.join(sorted(known))}; expected "
                "video and caption, or latents and text (see vdx.data.records)."
            )
        object.__setattr__(self, "rows", builder.as_data_source(self.split))
        object.__setattr__(self, "metadata", dict(builder.info.metadata or {}))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record | dict:
        key = f"{self.path}/{self.split}/{index}"
        try:
            row = self.rows[index]
        except Exception as error:  # ArrayRecord verifies a checksum of every chunk
            raise BadRecord(key, f"unreadable: {error}") from error
        key = row["key"].decode() if row.get("key") else key
        if "latents" in row:
            return ready_example(row, key, self.metadata)
        return video_record(key, row["caption"].decode(), lambda: io.BytesIO(row["video"]))


SOURCES: dict[str, Callable[..., Any]] = {
    "scenes": Scenes,
    "folder": VideoFolder,
    "records": Records,
}
