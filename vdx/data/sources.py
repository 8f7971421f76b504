"""Data sources: procedural scenes, a folder of videos, or prepared records.

A source is a frozen dataclass of plain fields with `len()` and `source[i]`. An item is a Record,
or a dict that is a ready example (cached latents). To add one, write the class and a row of
SOURCES. A single file that cannot be used raises BadRecord when it is read. A data set that is
missing or empty raises ValueError when the source is made.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vdx.config.ranges import Fraction
from vdx.data.folders import FolderListing, VideoEntry, list_videos, validation_names
from vdx.data.metadata import stays_inside
from vdx.data.record import BadRecord, Reader, Record, frame_index_at
from vdx.data.records import check_classes, ready_example
from vdx.data.scenes.source import Scenes
from vdx.data.track_files import TRACK_FILES
from vdx.data.video_files import VIDEOS, Opener, guard, video_record
from vdx.files import check_regular_file, file_stamp, open_regular, warn_once
from vdx.text_files import MAX_CAPTION_BYTES, check_text, read_text

__all__ = ["SOURCES", "Records", "VideoFolder"]

SPLITS = ("all", "train", "validation")
SMALL = 50  # videos of a folder whose splits are reported even if nothing is wrong
FOLDER_SURVEYED = 10_000  # videos whose captions are surveyed; each may be a file to open
PREPARED = "prepare.json"  # a file of --out of vdx.prepare
DATA_SETS = ("latents", "clips")  # data sets in it; the first that is there is read
RECORD_KEYS = ("video", "caption", "key")  # features that are no attributes of a record
RECORDS_SURVEYED = 256  # records whose captions are surveyed; each is read with its video


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
    # Share of the files in "validation", by a hash of the name; 0: no validation. Of two or more
    # files each split has at least one.
    validation_fraction: Fraction = 0.1
    rows: tuple[VideoEntry, ...] = dataclasses.field(init=False, repr=False)  # videos of the split

    def __post_init__(self) -> None:
        """List the videos of the split; raises ValueError if there are none.

        Reports once what the folder contains, what is not used, and the splits.
        """
        root = Path(self.path)
        if self.split not in SPLITS:
            raise ValueError(f"split = {self.split!r} is none of {', '.join(SPLITS)}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction = {self.validation_fraction} is not in [0, 1).")

        if not self.path:
            raise ValueError("path is empty: give a folder of videos, --config.data.path=FOLDER.")

        # Every video of the folder.
        listing = list_videos(root)
        if not listing.entries:
            raise ValueError(
                f"No videos with captions in {root.resolve()}: looked for rows in metadata.jsonl, "
                f"then for {' '.join(VIDEOS)} files with a .txt of the same name. {listing}"
            )
        validation = validation_names(
            (entry.name for entry in listing.entries), self.validation_fraction
        )

        # Those of the split.
        rows = tuple(listing.entries)
        if self.split != "all":
            wanted = self.split == "validation"
            rows = tuple(entry for entry in rows if (entry.name in validation) == wanted)
        if not rows:
            raise ValueError(
                f"{root} has {len(listing.entries)} videos with captions, of which "
                f"validation_fraction = {self.validation_fraction} leaves none for validation. Add "
                "videos, or train and validate on the same ones: "
                "--config.data.source.split=all --config.data.validation.split=all."
            )

        self._report(listing, len(validation))
        object.__setattr__(self, "rows", rows)

    def __len__(self) -> int:
        """Return the number of videos in the split."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """Return video `index`; raises BadRecord if it cannot be used."""
        entry = self.rows[index]
        path = Path(self.path).absolute() / entry.name  # FFmpeg takes a bare "x:y" for an address
        guard(entry.name, lambda: check_regular_file(path))

        # Tracks are opened only when they are read.
        record = video_record(entry.name, _read_caption(entry), _opener(entry, path))
        tracks: dict[str, Reader] = {
            track: functools.partial(self._read_track, record, track, file)
            for track, file in entry.tracks
        }
        return dataclasses.replace(record, tracks=tracks)

    def captions(self) -> Iterator[str]:
        """Yield the captions of the first videos that can be used."""
        for entry in self.rows[:FOLDER_SURVEYED]:
            with contextlib.suppress(ValueError):  # of a bad record
                caption = _read_caption(entry)
                if isinstance(caption, str):
                    yield check_text(caption)

    def file_stamps(self) -> list[Any]:
        """Return the stamp of every video; see `file_stamp`."""
        return [file_stamp(Path(self.path) / entry.name) for entry in self.rows]

    def _report(self, listing: FolderListing, in_validation: int) -> None:
        """Log one line about the folder, if something in it is not used or it is small."""
        line = str(listing)
        videos = len({entry.name for entry in listing.entries})
        if self.split != "all":
            line += (
                f" Splits, by hashes of the names: {videos - in_validation} for training, "
                f"{in_validation} for validation."
            )
        if any(listing.left_out.values()) or (self.split != "all" and videos < SMALL):
            warn_once(line)

    def _read_track(self, record: Record, track: str, file: Any, times: np.ndarray) -> np.ndarray:
        """Return a track at instants, from its file.

        Raises BadRecord of the record, with the name of the file.
        """

        def read() -> np.ndarray:
            if not isinstance(file, str) or not stays_inside(file):
                raise ValueError("expected the name of a file inside the folder, / between folders")
            path = Path(self.path).absolute() / file
            check_regular_file(path)

            stamps = record.timestamps
            assert stamps is not None  # a video has them
            video = lambda: video_record(file, "", lambda: str(path)).read(times)
            return TRACK_FILES[track](path, frame_index_at(stamps, times), len(stamps), video)

        return guard(record.key, read, what=f"{track} {file!r}")


def _read_caption(entry: VideoEntry) -> Any:
    """Return the caption of a video, from its text file if it has one.

    Raises BadRecord for a file that is no text.
    """
    caption = entry.caption
    if not isinstance(caption, Path):
        return caption
    return guard(entry.name, lambda: read_text(caption, MAX_CAPTION_BYTES).strip(), what="caption")


def _opener(entry: VideoEntry, path: Path) -> Opener:
    """Return the opener of a video; with a checksum, of bytes that match it."""
    if entry.sha256 is None:
        return lambda: str(path)
    expected = entry.sha256
    data = guard(entry.name, lambda: _verified_bytes(path, expected))
    return lambda: io.BytesIO(data)


def _verified_bytes(path: Path, sha256: str) -> bytes:
    """Return the bytes of a file; raises ValueError if its checksum differs."""
    with open_regular(path) as file:
        data = file.read()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"its SHA-256 is {found[:12]}..., metadata.jsonl says {sha256[:12]}...")
    return data


@dataclasses.dataclass(frozen=True)
class Records:
    """ArrayRecord files that vdx.prepare or tensorflow_datasets prepared.

    `vdx.data.records` lists the features: mp4 bytes with captions, whose items are Records, or
    cached latents, whose items are ready examples.
    """

    # The directory that contains `features.json`, or --out of vdx.prepare: its latents are read
    # if there are any, else its clips.
    path: str
    split: str = "train"  # a split of the data set; "all": all of them
    rows: Sequence[Mapping[str, Any]] = dataclasses.field(init=False, repr=False)
    metadata: dict[str, Any] = dataclasses.field(init=False, repr=False)  # as `write_records` took

    def __post_init__(self) -> None:
        """Open the split; raises ValueError if the directory does not hold usable records."""
        directory = _data_set(Path(self.path))
        if not (directory / "features.json").exists():
            raise ValueError(
                f"{directory.resolve()} holds no features.json: it is no directory that "
                "vdx.prepare, `vdx.data.records.write_records` or TFDS prepared."
            )
        # Before TFDS imports what the directory names.
        check_classes(directory)
        import tensorflow_datasets as tfds  # takes a second, which other sources save

        builder = tfds.builder_from_directory(directory)
        splits = builder.info.splits
        split = "+".join(splits) if self.split == "all" else self.split
        if self.split not in (*splits, "all"):
            hint = ""
            if self.split == "validation":
                hint = " Train and validate on the same ones: --config.data.validation.split=train."
            raise ValueError(
                f"{self.path} has no split {self.split!r}; it has {', '.join(splits)}.{hint}"
            )

        # Either encoded videos or cached latents.
        names = set(builder.info.features)
        if not names >= {"video", "caption"} and not names >= {"latents", "text"}:
            raise ValueError(
                f"{self.path} has the features {', '.join(sorted(names))}; expected "
                "video and caption, or latents and text (see vdx.data.records)."
            )

        object.__setattr__(self, "rows", builder.as_data_source(split))
        object.__setattr__(self, "metadata", dict(builder.info.metadata or {}))

    def __len__(self) -> int:
        """Return the number of records in the split."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Record | dict[str, Any]:
        """Return record `index`; raises BadRecord if it cannot be used."""
        key, row = self._read_row(index)
        if "latents" in row:
            return ready_example(row, key, self.metadata)
        caption = guard(key, row["caption"].decode, what="caption")
        record = video_record(key, caption, lambda: io.BytesIO(row["video"]))
        attributes = {name: row[name] for name in row if name not in RECORD_KEYS}
        return dataclasses.replace(record, attributes=attributes)

    def captions(self) -> Iterator[str]:
        """Yield the captions of the first records that can be used."""
        for index in range(min(RECORDS_SURVEYED, len(self.rows))):
            with contextlib.suppress(BadRecord):
                key, row = self._read_row(index)
                yield guard(key, row["caption"].decode, what="caption")

    def file_stamps(self) -> list[Any]:
        """Return the name and the stamp of every file of the directory; see `file_stamp`."""
        folder = _data_set(Path(self.path))
        return [(path.name, file_stamp(path)) for path in sorted(folder.iterdir())]

    def _read_row(self, index: int) -> tuple[str, Mapping[str, Any]]:
        """Return (key, features) of record `index`; raises BadRecord for a damaged chunk."""
        key = f"{self.path}/{self.split}/{index}"
        try:
            row = self.rows[index]
        except Exception as error:  # ArrayRecord verifies a checksum of every chunk
            raise BadRecord(key, f"unreadable: {error}") from error
        return row["key"].decode("utf-8", "replace") if row.get("key") else key, row


def _data_set(path: Path) -> Path:
    """Return the data set of TFDS in --out of vdx.prepare; any other path as it is."""
    if not (path / PREPARED).is_file():
        return path
    for name in DATA_SETS:
        if (path / name / "features.json").is_file():
            return path / name
    raise ValueError(f"{path.resolve()} holds no clips yet: run vdx.prepare with --until=clips.")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of video files with captions, or --out of vdx.prepare."""

    path: str  # see VideoFolder, and Records for --out of vdx.prepare
    split: Literal["all", "train", "validation"] = "all"  # the part that is read
    # See VideoFolder; vdx.prepare has its own, config.shards.validation_fraction.
    validation_fraction: Fraction = 0.1
    source: VideoFolder | Records = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Open the folder; raises ValueError if it holds nothing usable."""
        source: VideoFolder | Records
        if self.path and (Path(self.path) / PREPARED).is_file():
            source = Records(self.path, self.split)
        else:
            source = VideoFolder(self.path, self.split, self.validation_fraction)
        object.__setattr__(self, "source", source)

    def __len__(self) -> int:
        """Return the number of videos in the split."""
        return len(self.source)

    def __getitem__(self, index: int) -> Record | dict[str, Any]:
        """Return video `index`; raises BadRecord if it cannot be used."""
        return self.source[index]

    def captions(self) -> Iterator[str]:
        """Yield the captions of the first videos that can be used."""
        return self.source.captions()

    @property
    def rows(self) -> Sequence[Any]:
        """Return the videos of the split, as `source` has them."""
        return self.source.rows

    def file_stamps(self) -> list[Any]:
        """Return the stamps of the files; see `file_stamp`."""
        return self.source.file_stamps()

    @property
    def metadata(self) -> dict[str, Any]:
        """Return what was stored with prepared data; empty for video files."""
        return getattr(self.source, "metadata", {})


SOURCES: dict[str, Callable[..., Any]] = {
    "scenes": Scenes,
    "folder": Folder,
    "records": Records,
}
