"""Clips of footage as mp4 bytes, with their timestamps, motion and audio.

The bytes depend on the footage, the span and the settings alone: one thread of x264, without its
macroblock tree. A source is decoded once for all of its clips.
"""

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import av
import numpy as np

from vdx.config.ranges import Count, Index, Interval
from vdx.data.encoding import X264, add_stream, yuv_frame
from vdx.data.motion import motion_score
from vdx.data.preparation.audio import read_audio
from vdx.data.preparation.store import Store, key_of
from vdx.data.resize import resize
from vdx.data.video_files import ANIMATION, Footage, Opener, open_footage

__all__ = ["VERSION", "ClipSettings", "ClipSpan", "clip_key", "make_clips", "read_clip"]

VERSION = 1  # of the bytes; a change of the encoding raises it
TICKS = 90_000  # a second, of timestamps; those of Matroska and of 1001/30000 are near multiples
NEAR = 1e-6  # seconds
# One thread, since their number changes the bytes. No B-frames, since an mp4 stores durations in
# decoding order: the last frame on the screen would lose its own.
EXACT = {"threads": "1", "bf": "0"}


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """`config.clips`: how a clip is stored."""

    short_side: Count | None = None  # pixels; larger clips are made smaller; null: as they are
    crf: Annotated[int, Interval(0, 51)] = (
        16  # x264's constant rate factor; 16 is visually lossless, 0 lossless
    )
    audio_rate: Index = 16_000  # samples a second, mono; 0: no audio


class ClipSpan(NamedTuple):
    """A clip to make."""

    key: str  # of the cache
    start: float  # seconds from the first frame shown
    end: float  # seconds, exclusive
    crop: Sequence[int] | None  # [x, y, w, h] of upright frames


def clip_key(sha256: str, row: Mapping[str, Any], settings: ClipSettings) -> str:
    """Return the key of the clip of a row of clips.jsonl; its caption is in no key."""
    return key_of(
        stage="clips",
        version=VERSION,
        settings=dataclasses.asdict(settings),
        sha256=sha256,
        span=[row["start"], row["end"]],
        crop=row["crop"],
    )


def make_clips(path: Path, spans: Sequence[ClipSpan], settings: ClipSettings, store: Store) -> None:
    """Write those clips of a source into the cache that are not there.

    Raises ValueError that names the source if it does not decode as it did before.
    """
    spans = sorted((span for span in spans if not store.has(span.key)), key=lambda span: span.start)
    if not spans:
        return
    opener = lambda: str(path.absolute())
    try:
        footage = open_footage(opener, partial=True)
        ends = np.append(footage.stamps[1:], footage.duration)
        numbers = [_numbers(footage.stamps, span) for span in spans]
        frames = _pixels(footage, opener, np.concatenate(numbers).tolist())
        for span, own in zip(spans, numbers, strict=True):
            clip = _Encoder(span, settings)
            for number in own:
                clip.add(next(frames), footage.stamps[number], ends[number])
            clip.audio = _audio(opener(), span, footage.origin, settings)
            store.get(span.key, clip.to_bytes)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} does not decode as it did when it was looked at: {error}. Run the same "
            "command again; if the file has changed, it is looked at anew."
        ) from error


def read_clip(data: bytes) -> dict[str, np.ndarray]:
    """Return the features of a clip of the cache.

    Keys: video uint8 [bytes], an mp4; timestamps float32 [t], seconds from the clip's start; fps,
    frames a second; motion, see `vdx.data.motion`; audio int16 [samples] at audio_rate.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _numbers(stamps: np.ndarray, span: ClipSpan) -> np.ndarray:
    """Return the numbers of the frames of a span, int [t]. Raises ValueError for none."""
    numbers = np.flatnonzero((stamps >= span.start - NEAR) & (stamps < span.end - NEAR))
    if not len(numbers):
        raise ValueError(f"no frame from {span.start} to {span.end} seconds")
    return numbers


def _pixels(footage: Footage, opener: Opener, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the frames `numbers`, which ascend, in one decode.

    Where a frame between them is damaged, decoding starts again at the next of them.
    """
    wanted = set(numbers)
    place = 0
    while place < len(numbers):
        begun = place
        try:
            for frame in footage.all_frames(opener, numbers[place]):
                if frame.number in wanted:
                    yield frame.pixels
                    place += 1
                if place == len(numbers):
                    return
        except (av.error.FFmpegError, ValueError):
            if place == begun:
                raise


def _audio(path: str, span: ClipSpan, origin: float, settings: ClipSettings) -> np.ndarray:
    """Return the audio of a span, int16 [samples]; empty if there is none."""
    with open(path, "rb") as file:
        is_animation = ANIMATION.match(file.read(16))
    if is_animation or not settings.audio_rate:
        return np.zeros(0, np.int16)
    return read_audio(path, span.start, span.end, origin, settings.audio_rate)


class _Encoder:
    """A clip that frames are added to; memory holds two of them."""

    def __init__(self, span: ClipSpan, settings: ClipSettings) -> None:
        self.span = span
        self.settings = settings
        self.file = io.BytesIO()
        self.audio = np.zeros(0, np.int16)
        self.stamps: list[float] = []
        self._container = av.open(self.file, "w", format="mp4", options={"fflags": "+bitexact"})
        self._stream: Any = None
        self._durations: dict[int, int] = {}  # ticks, by time
        self._before: np.ndarray | None = None
        self._changes: list[float] = []

    def add(self, pixels: np.ndarray, start: float, end: float) -> None:
        """Encode a frame uint8 [h w 3]; start and end in seconds of the source."""
        frame = _fit(pixels, self.span.crop, self.settings.short_side)
        if self._stream is None:
            options = {**X264, "crf": str(self.settings.crf), **EXACT}
            height, width = frame.shape[:2]
            self._stream = add_stream(self._container, Fraction(TICKS), height, width, options)
        if self._before is not None:
            self._changes.append(motion_score(np.stack([self._before, frame]), fps=1))
        self._before = frame

        self.stamps.append(start - self.span.start)
        tick = round(self.stamps[-1] * TICKS)
        stop = round((min(end, self.span.end) - self.span.start) * TICKS)
        self._durations[tick] = max(stop - tick, 1)
        self._mux(self._stream.encode(yuv_frame(frame, tick, Fraction(TICKS))))

    def _mux(self, packets: Sequence[Any]) -> None:
        """Write packets with the durations of their frames, which x264 does not pass on."""
        for packet in packets:
            packet.duration = self._durations[packet.pts]
            self._container.mux(packet)

    def to_bytes(self) -> bytes:
        """Return the features of the clip as the bytes of a file of arrays."""
        self._mux(self._stream.encode(None))
        self._container.close()

        # The rate of the frames; a single one lasts as long as the clip.
        seconds = self.span.end - self.span.start
        fps = len(self.stamps) / seconds
        if len(self.stamps) > 1:
            fps = (len(self.stamps) - 1) / (self.stamps[-1] - self.stamps[0])
        change = float(np.mean(self._changes)) if self._changes else 0.0
        out = io.BytesIO()
        np.savez(
            out,
            video=np.frombuffer(self.file.getvalue(), np.uint8),
            timestamps=np.array(self.stamps, np.float32),
            fps=np.float32(fps),
            motion=np.float32(fps * change),
            audio=self.audio,
            audio_rate=np.int32(self.settings.audio_rate),
        )
        return out.getvalue()


def _fit(pixels: np.ndarray, crop: Sequence[int] | None, short_side: int | None) -> np.ndarray:
    """Return uint8 [h w 3] cropped, made smaller, with even sides as 4:2:0 needs them."""
    if crop is not None:
        x, y, width, height = crop
        pixels = pixels[y : y + height, x : x + width]
    height, width = pixels.shape[:2]
    scale = min(1.0, (short_side or min(height, width)) / min(height, width))
    if scale == 1:
        even = pixels[: max(height - height % 2, 1), : max(width - width % 2, 1)]
        pad = (even.shape[0] % 2, even.shape[1] % 2)  # of one row or column
        return np.pad(even, ((0, pad[0]), (0, pad[1]), (0, 0)), mode="edge")
    size = [max(2, 2 * round(side * scale / 2)) for side in (height, width)]
    return resize(pixels[None], *size)[0]
