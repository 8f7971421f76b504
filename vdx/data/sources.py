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

import av
import numpy as np

from vdx.data.record import BadRecord, Record, shown
from vdx.data.records import check_classes, ready_example
from vdx.data.scenes.source import Scenes
from vdx.data.track_files import TRACK_FILES, VIDEOS

__all__ = [
    "SOURCES",
    "Records",
    "VideoFolder",
    "decode",
    "list_videos",
    "open_video",
    "pixels",
    "read_metadata",
    "video_record",
]

CONTAINERS = "avi,matroska,mp4"  # as FFmpeg calls those of VIDEOS
MOST_PIXELS = 1 << 26  # of a frame; a damaged or hostile header may ask for all memory
SHA256 = re.compile("[0-9a-f]{64}")
SPLITS = ("all", "train", "validation")

Opener = Callable[[], str | io.BytesIO]


def open_video(file: str | io.BytesIO):
    """(container, its first video stream). Raises ValueError where there is none.

    FFmpeg would also open playlists, which name other files and addresses, and pictures: what
    the file says it is must be one of the containers of VIDEOS.
    """
    try:
        container = av.open(
            file, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        )
    except av.error.ArgumentError as error:
        raise ValueError(f"not one of the containers {CONTAINERS}") from error
    try:
        return container, _video_stream(container)
    except BaseException:
        container.close()
        raise


def _video_stream(container):
    if not container.streams.video:
        raise ValueError("no video stream")
    stream = container.streams.video[0]
    codec = stream.codec_context
    if codec is None:
        raise ValueError("an unknown codec")
    if codec.width * codec.height > MOST_PIXELS:
        raise ValueError(f"frames of {codec.height}x{codec.width}, more than {MOST_PIXELS} pixels")
    codec.options = {"max_pixels": str(MOST_PIXELS)}  # the stream itself may say otherwise
    codec.thread_count = 1  # the loader's own threads share the cores
    return stream


def pixels(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [h w 3] of a decoded frame, upright: phones store the turn beside the picture."""
    turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return np.ascontiguousarray(turned)


def _probe(file: str | io.BytesIO) -> tuple[np.ndarray, float, float]:
    """(presentation stamps, ascending, in ticks; seconds in a tick; duration in seconds).

    Read from the packets and never guessed from a frame rate; nothing is decoded.
    """
    container, stream = open_video(file)
    with container:
        packets = [p for p in container.demux(stream) if p.size]
        if len(packets) < stream.frames:
            raise ValueError(f"truncated: {len(packets)} of {stream.frames} frames are there")
        shown = [p for p in packets if not p.is_discard]
        if not shown or any(p.pts is None for p in shown):
            raise ValueError("no frames" if not shown else "frames without presentation times")
        tick = float(stream.time_base)
        stamps = np.unique([p.pts for p in shown])
        last = max(shown, key=lambda p: p.pts).duration
    if not last:  # not every container says how long the last frame stays
        last = float(np.median(np.diff(stamps))) if len(stamps) > 1 else 0.0
    return stamps, tick, float(stamps[-1] - stamps[0] + last) * tick


def decode(file: str | io.BytesIO, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """The frames with the presentation stamps `wanted` (ticks): stamp -> uint8 [h w 3].

    Decodes from the key frame before the first to the last that is wanted. Raises ValueError
    for a damaged frame on the way, which the decoder itself would only paint over.
    """
    container, stream = open_video(file)
    found: dict[int, np.ndarray] = {}
    needed = {int(stamp) for stamp in wanted}
    with container:
        if min(needed) > (stream.start_time or 0):
            container.seek(min(needed), stream=stream)
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError("damaged frame")
            if frame.pts in needed:
                found[frame.pts] = pixels(frame)
                if len(found) == len(needed):
                    break
    if len(found) < len(needed):
        raise ValueError(f"{len(needed) - len(found)} of {len(needed)} frames do not decode")
    return found


def _guard(key: str, work: Callable, *arguments, what: str = "video"):
    """`work(*arguments)`, with whatever a bad file makes it raise as BadRecord."""
    try:
        return work(*arguments)
    except BadRecord as error:
        if error.key == key:
            raise
        raise BadRecord(key, f"not a usable {what}: {error.reason}") from error
    except Exception as error:  # there is no list of what decoders raise on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadRecord(key, f"not a usable {what}: {reason}") from error


def video_record(key: str, caption: Any, opener: Opener) -> Record:
    """The record of an encoded video; `opener()` gives a path or a fresh BytesIO.

    Timestamps count from the first frame. Raises BadRecord, at once or in `read`.
    """
    if not isinstance(caption, str):
        raise BadRecord(
            key,
            "the caption is missing"
            if caption is None
            else f"the caption is {type(caption).__name__}, expected text",
        )
    ticks, tick, duration = _guard(key, lambda: _probe(opener()))
    stamps = (ticks - ticks[0]) * tick

    def read(times: np.ndarray) -> np.ndarray:
        wanted = ticks[shown(stamps, times)]
        found = _guard(key, lambda: decode(opener(), wanted))
        sizes = {frame.shape[:2] for frame in found.values()}
        if len(sizes) > 1:
            raise BadRecord(
                key,
                "the frames change size: "
                + " then ".join(f"{height}x{width}" for height, width in sorted(sizes)),
            )
        return np.stack([found[int(stamp)] for stamp in wanted])

    return Record(key, caption, duration, stamps, read)


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
    split: "all", "train" or "validation"; heldout: the share of the files, by a hash of the name.

    Most damage to an encoded video decodes to other pixels without a sign. A file with "sha256",
    which `python -m vdx.data.checksums` writes, is compared with it whenever it is opened.

    Names must stay inside the folder. Links are followed wherever they lead: downloads are often
    folders of links into a cache, and a list of names cannot make one.
    """

    path: str
    split: str = "all"
    validation: float = 0.1
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
            or _is_validation(row.name, self.validation) == (self.split == "validation")
        ]
        if not kept:
            raise ValueError(
                f"None of the {len(rows)} videos of {root} is in the split "
                f"{self.split!r} with heldout = {self.validation}."
            )
        object.__setattr__(self, "rows", tuple(kept))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        name, caption, sha256, beside = self.rows[index]
        path = Path(self.path).absolute() / name  # a bare "x:y" would be an address to FFmpeg
        _guard(name, _check_file, path)
        if isinstance(caption, Path):
            caption = _guard(name, functools.partial(caption.read_text, encoding="utf-8")).strip()
        opener: Opener = lambda: str(path)
        if sha256 is not None:
            data = _guard(name, _verified, path, sha256)
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
            return TRACK_FILES[track](path, shown(stamps, times), len(stamps), video)

        return _guard(record.key, read, what=f"{track} {file!r}")


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
                "directory prepared by `python -m vdx.prepare` or TFDS."
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
