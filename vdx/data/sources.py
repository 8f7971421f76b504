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
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np

from vdx.data.cache import ready_example
from vdx.data.record import BadRecord, Record
from vdx.data.scenes import Scenes

__all__ = ["SOURCES", "Records", "VideoFolder", "decode", "open_video", "pixels",
           "video_record"]

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
SPLITS = ("all", "train", "heldout")
ROUNDING = 1e-3  # seconds; Matroska rounds timestamps to milliseconds

Opener = Callable[[], str | io.BytesIO]


def open_video(file: str | io.BytesIO):
    """(container, its first video stream). Raises ValueError where there is none."""
    container = av.open(file)
    if not container.streams.video:
        container.close()
        raise ValueError("no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # the loader's own threads share the cores
    return container, stream


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


def _guard(key: str, work: Callable, *arguments):
    """`work(*arguments)`, with whatever a bad file makes it raise as BadRecord."""
    try:
        return work(*arguments)
    except BadRecord:
        raise
    except (ValueError, OSError, av.error.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadRecord(key, f"not a usable video: {reason}") from error


def video_record(key: str, caption: Any, opener: Opener) -> Record:
    """The record of an encoded video; `opener()` gives a path or a fresh BytesIO.

    Timestamps count from the first frame. Raises BadRecord, at once or in `read`.
    """
    if not isinstance(caption, str):
        raise BadRecord(key, "the caption is missing" if caption is None else
                        f"the caption is {type(caption).__name__}, expected text")
    ticks, tick, duration = _guard(key, lambda: _probe(opener()))
    stamps = (ticks - ticks[0]) * tick

    def read(times: np.ndarray) -> np.ndarray:
        shown = np.searchsorted(stamps, np.asarray(times) + ROUNDING, side="right") - 1
        wanted = ticks[np.maximum(shown, 0)]
        found = _guard(key, lambda: decode(opener(), wanted))
        return np.stack([found[int(stamp)] for stamp in wanted])

    return Record(key, caption, duration, stamps, read)


def _is_heldout(name: str, share: float) -> bool:
    """Depends on the name alone, so a clip never changes sides when others are added."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


@dataclasses.dataclass(frozen=True)
class VideoFolder:
    """Video files with captions.

    path: a folder with `metadata.jsonl`, rows {"file_name", "caption"} (other keys are
      ignored), or else videos that have a caption in a `.txt` file of the same name.
    split: "all", "train" or "heldout"; heldout: the share of the files, by a hash of the name.
    """

    path: str
    split: str = "all"
    heldout: float = 0.1
    # (file name, caption); a caption of None is looked for in the text file beside the video.
    rows: tuple[tuple[str, Any], ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        root = Path(self.path)
        if self.split not in SPLITS:
            raise ValueError(f"split = {self.split!r} is none of {', '.join(SPLITS)}.")
        if not root.is_dir():
            raise ValueError(f"There is no folder {root.resolve()}.")
        listed = (root / "metadata.jsonl").exists()
        rows = _listed_rows(root / "metadata.jsonl") if listed else _sidecar_rows(root)
        if not rows:
            raise ValueError(f"No videos in {root.resolve()}: looked for rows in metadata.jsonl, "
                             f"then for {' '.join(VIDEOS)} files with a .txt of the same name.")
        kept = [row for row in rows if self.split == "all" or
                _is_heldout(row[0], self.heldout) == (self.split == "heldout")]
        if not kept:
            raise ValueError(f"None of the {len(rows)} videos of {root} is in the split "
                             f"{self.split!r} with heldout = {self.heldout}.")
        object.__setattr__(self, "rows", tuple(kept))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        name, caption = self.rows[index]
        path = Path(self.path) / name
        if isinstance(caption, Path):
            caption = _guard(name, functools.partial(caption.read_text, encoding="utf-8")).strip()
        return video_record(name, caption, lambda: str(path))


def _listed_rows(path: Path) -> list[tuple[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}. The line is {line[:80]!r}.") from None
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f'{where} has no "file_name": {line[:80]!r}. A row reads '
                             '{"file_name": "clip.mp4", "caption": "what it shows"}.')
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{where}: {name!r} leaves the folder; name files inside it.")
        rows.append((name, row.get("caption")))
    return rows


def _sidecar_rows(root: Path) -> list[tuple[str, Any]]:
    videos = sorted(p for p in root.rglob("*") if p.suffix.lower() in VIDEOS)
    texts = [p.with_suffix(".txt") for p in videos]
    if not any(t.exists() for t in texts):
        return []
    return [(v.relative_to(root).as_posix(), t if t.exists() else None)
            for v, t in zip(videos, texts, strict=True)]


@dataclasses.dataclass(frozen=True)
class Records:
    """A directory that tensorflow_datasets prepared in the ArrayRecord format.

    path: the directory with `features.json`; `vdx.data.cache` says what the features may be:
      mp4 bytes with captions, which give Records, or cached latents, which give examples.
    """

    path: str
    split: str = "train"
    rows: Any = dataclasses.field(init=False, repr=False)
    metadata: dict = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        if not (Path(self.path) / "features.json").exists():
            raise ValueError(f"{Path(self.path).resolve()} holds no features.json: it is not a "
                             "directory prepared by `python -m vdx.prepare` or TFDS.")
        import tensorflow_datasets as tfds  # a second of import, which other sources spare
        builder = tfds.builder_from_directory(self.path)
        if self.split not in builder.info.splits:
            raise ValueError(f"{self.path} has no split {self.split!r}; it has "
                             f"{', '.join(builder.info.splits)}.")
        known = set(builder.info.features)
        if not known >= {"video", "caption"} and not known >= {"latents", "text"}:
            raise ValueError(f"{self.path} has the features {', '.join(sorted(known))}; expected "
                             "video and caption, or latents and text (see vdx.data.cache).")
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
    "scenes": Scenes, "folder": VideoFolder, "records": Records}
