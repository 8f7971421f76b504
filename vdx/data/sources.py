"""Data sources: procedural scenes, a folder of videos, or prepared records.

A source is a frozen dataclass of plain fields with `len()` and `source[i]`. An item is a Record,
or a dict that is a ready example (cached latents). To add one, write the class and a row of
SOURCES. A single file that cannot be used raises BadRecord when it is read. A data set that is
missing or empty raises ValueError when the source is made.
"""

import dataclasses
import functools
import hashlib
import io
import json
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple

import numpy as np

from vdx.config.ranges import Fraction
from vdx.data.record import BadRecord, Reader, Record, frame_index_at
from vdx.data.records import check_classes, ready_example
from vdx.data.scenes.source import Scenes
from vdx.data.track_files import TRACK_FILES
from vdx.data.video_files import VIDEOS, Opener, guard, is_video, video_record

__all__ = ["SOURCES", "Records", "VideoEntry", "VideoFolder", "list_videos", "read_metadata"]

SHA256 = re.compile("[0-9a-f]{64}")
SPLITS = ("all", "train", "validation")


class VideoEntry(NamedTuple):
    """One video of a folder."""

    name: str  # path relative to the folder, with / between folders
    caption: Any  # the text, or the Path of a text file that contains it
    sha256: str | None = None  # 64 hex digits; None: not compared
    tracks: tuple[tuple[str, Any], ...] = ()  # (row of TRACK_FILES, file name)


@dataclasses.dataclass(frozen=True)
class VideoFolder:
    """Video files with captions.

    Most damage to an encoded video decodes to other pixels without an error. A file with
    "sha256", which `python -m vdx.data.checksums` writes, is compared with it when it is opened.

    Names must stay inside the folder. Links are followed wherever they lead: downloads are often
    folders of links into a cache, and a list of names cannot make one.
    """

    # A folder with `metadata.jsonl`, rows {"file_name", "caption"}. A row may have "sha256" and
    # files of control signals, under the keys of `vdx.data.track_files`; other keys are ignored.
    # Without metadata.jsonl: videos with a `.txt` file of the same name that holds the caption.
    path: str
    split: Literal["all", "train", "validation"] = "all"  # the part that is read
    validation_fraction: Fraction = 0.1  # share of the files in "validation", by a hash of the name
    rows: tuple[VideoEntry, ...] = dataclasses.field(init=False, repr=False)  # videos of the split

    def __post_init__(self) -> None:
        """List the videos of the split; raises ValueError if there are none."""
        root = Path(self.path)
        if self.split not in SPLITS:
            raise ValueError(f"split = {self.split!r} is none of {', '.join(SPLITS)}.")

        # Every video of the folder.
        rows = list_videos(root)
        if not rows:
            raise ValueError(
                f"No videos in {root.resolve()}: looked for rows in metadata.jsonl, "
                f"then for {' '.join(VIDEOS)} files with a .txt of the same name."
            )

        # Those of the split.
        kept = tuple(row for row in rows if self._in_split(row.name))
        if not kept:
            raise ValueError(
                f"None of the {len(rows)} videos of {root} is in the split {self.split!r} "
                f"with validation_fraction = {self.validation_fraction}."
            )

        object.__setattr__(self, "rows", kept)

    def __len__(self) -> int:
        """Return the number of videos in the split."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """Return video `index`; raises BadRecord if it cannot be used."""
        entry = self.rows[index]
        path = Path(self.path).absolute() / entry.name  # FFmpeg takes a bare "x:y" for an address
        guard(entry.name, lambda: _check_file(path))

        # Tracks are opened only when they are read.
        record = video_record(entry.name, _read_caption(entry), _opener(entry, path))
        tracks: dict[str, Reader] = {
            track: functools.partial(self._read_track, record, track, file)
            for track, file in entry.tracks
        }
        return dataclasses.replace(record, tracks=tracks)

    def _in_split(self, name: str) -> bool:
        """Return true if the split contains the file.

        Depends on the name alone, so a clip never changes sides when others are added.
        """
        if self.split == "all":
            return True
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        in_validation = int.from_bytes(digest) < self.validation_fraction * 2**64
        return in_validation == (self.split == "validation")

    def _read_track(self, record: Record, track: str, file: Any, times: np.ndarray) -> np.ndarray:
        """Return a track at instants, from its file.

        Raises BadRecord of the record, with the name of the file.
        """

        def read() -> np.ndarray:
            if not isinstance(file, str) or not _stays_inside(file):
                raise ValueError("expected the name of a file inside the folder, / between folders")
            path = Path(self.path).absolute() / file
            _check_file(path)

            stamps = record.timestamps
            assert stamps is not None  # a video has them
            video = lambda: video_record(file, "", lambda: str(path)).read(times)
            return TRACK_FILES[track](path, frame_index_at(stamps, times), len(stamps), video)

        return guard(record.key, read, what=f"{track} {file!r}")


def _read_caption(entry: VideoEntry) -> Any:
    """Return the caption of a video, from its text file if it has one."""
    caption = entry.caption
    if not isinstance(caption, Path):
        return caption
    return guard(entry.name, lambda: caption.read_text(encoding="utf-8").strip())


def _opener(entry: VideoEntry, path: Path) -> Opener:
    """Return the opener of a video; with a checksum, of bytes that match it."""
    if entry.sha256 is None:
        return lambda: str(path)
    expected = entry.sha256
    data = guard(entry.name, lambda: _verified_bytes(path, expected))
    return lambda: io.BytesIO(data)


def _check_file(path: Path) -> None:
    """Raise ValueError for anything but a file.

    A pipe would never open, a device never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file")


def _verified_bytes(path: Path, sha256: str) -> bytes:
    """Return the bytes of a file; raises ValueError if its checksum differs."""
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"its SHA-256 is {found[:12]}..., metadata.jsonl says {sha256[:12]}...")
    return data


def list_videos(root: Path) -> list[VideoEntry]:
    """Return the videos of a folder.

    They are the rows of `metadata.jsonl`, or else files with a text file of the same name.
    Raises ValueError if there is no folder, and for the first row that is not valid.
    """
    if not root.is_dir():
        raise ValueError(f"There is no folder {root.resolve()}.")
    metadata = root / "metadata.jsonl"
    if metadata.exists():
        return [_entry(row) for row in read_metadata(metadata)]

    videos = sorted(path for path in root.rglob("*") if is_video(path))
    texts = [path.with_suffix(".txt") for path in videos]
    if not any(text.exists() for text in texts):
        return []
    return [
        VideoEntry(video.relative_to(root).as_posix(), text if text.exists() else None)
        for video, text in zip(videos, texts, strict=True)
    ]


def _entry(row: Mapping[str, Any]) -> VideoEntry:
    """Return the entry of a row of `metadata.jsonl`."""
    tracks = tuple((name, row[name]) for name in TRACK_FILES if row.get(name) is not None)
    return VideoEntry(row["file_name"], row.get("caption"), row.get("sha256"), tracks)


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metadata.jsonl`; raises ValueError if one is not valid."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [
        _parse_row(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _parse_row(line: str, where: str) -> dict[str, Any]:
    """Return a line of `metadata.jsonl` as a row; raises ValueError naming `where`."""
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
            f"{where}: {name!r} leaves the folder; name files inside it, with / between folders."
        )

    sha256 = row.get("sha256")
    if sha256 is not None and not (isinstance(sha256, str) and SHA256.fullmatch(sha256)):
        raise ValueError(
            f'{where}: "sha256" is {sha256!r}, expected 64 of 0-9 a-f. Remove it, '
            "and let `python -m vdx.data.checksums` write it."
        )
    return row


def _stays_inside(name: str) -> bool:
    """Return true if a name stays inside its folder on every operating system.

    A plain name on one system may be a path or a drive on another.
    """
    path = PurePosixPath(name)
    return not (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or "\0" in name
        or PureWindowsPath(name).drive
    )


@dataclasses.dataclass(frozen=True)
class Records:
    """A directory that tensorflow_datasets prepared in the ArrayRecord format.

    `vdx.data.records` lists the features: mp4 bytes with captions, whose items are Records, or
    cached latents, whose items are ready examples.
    """

    path: str  # the directory that contains `features.json`
    split: str = "train"  # a split of the data set
    rows: Sequence[Mapping[str, Any]] = dataclasses.field(init=False, repr=False)
    metadata: dict[str, Any] = dataclasses.field(init=False, repr=False)  # as `write_records` took

    def __post_init__(self) -> None:
        """Open the split; raises ValueError if the directory does not hold usable records."""
        directory = Path(self.path)
        if not (directory / "features.json").exists():
            raise ValueError(
                f"{directory.resolve()} holds no features.json: it is no directory that "
                "`vdx.data.records.write_records` or TFDS prepared."
            )
        # Before TFDS imports what the directory names.
        check_classes(directory)
        import tensorflow_datasets as tfds  # takes a second, which other sources save

        builder = tfds.builder_from_directory(self.path)
        splits = builder.info.splits
        if self.split not in splits:
            raise ValueError(
                f"{self.path} has no split {self.split!r}; it has {', '.join(splits)}."
            )

        # Either encoded videos or cached latents.
        names = set(builder.info.features)
        if not names >= {"video", "caption"} and not names >= {"latents", "text"}:
            raise ValueError(
                f"{self.path} has the features {', '.join(sorted(names))}; expected "
                "video and caption, or latents and text (see vdx.data.records)."
            )

        object.__setattr__(self, "rows", builder.as_data_source(self.split))
        object.__setattr__(self, "metadata", dict(builder.info.metadata or {}))

    def __len__(self) -> int:
        """Return the number of records in the split."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Record | dict[str, Any]:
        """Return record `index`; raises BadRecord if it cannot be used."""
        key = f"{self.path}/{self.split}/{index}"
        try:
            row = self.rows[index]
        except Exception as error:  # ArrayRecord verifies a checksum of every chunk
            raise BadRecord(key, f"unreadable: {error}") from error

        if row.get("key"):
            key = row["key"].decode()
        if "latents" in row:
            return ready_example(row, key, self.metadata)
        return video_record(key, row["caption"].decode(), lambda: io.BytesIO(row["video"]))


SOURCES: dict[str, Callable[..., Any]] = {
    "scenes": Scenes,
    "folder": VideoFolder,
    "records": Records,
}
