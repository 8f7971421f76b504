"""From a record to a training example: instants, size and tokens of a clip.

There is no horizontal flip: captions say left and right.
"""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from vdx.config.build import ConfigError, check_fields
from vdx.config.ranges import Count, Index, Positive
from vdx.data.record import BadRecord, Record, frame_step
from vdx.data.resize import resize
from vdx.data.signals import Clip, read_signals

__all__ = ["ClipSampling", "Tokenize", "to_example"]

# tokenize(caption) -> (token ids int32 [l], mask bool [l])
Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]

ROUNDING = 1e-3  # seconds; containers round timestamps by as much
RATE_SLACK = 1.01  # uneven footage has a little less than its nominal rate on average
END_MARGIN = 1e-6  # seconds before the end of a procedural clip, where an instant still exists


@dataclasses.dataclass(frozen=True)
class ClipSampling:
    """The choice of a clip's instants in a record; section `data.clip` of a config."""

    num_frames: tuple[Count, ...] | Count  # lengths of clips; each batch has one of them
    # Frames per second of the clip, or several rates, of which each clip draws one. Only rates up
    # to the footage's own are drawn: above it frames would repeat and the motion stutter. Of these,
    # rates at which the footage fills the clip are preferred. Footage of 23.976 counts as 24: see
    # `vdx.data.record.frame_step`.
    fps: tuple[Positive, ...] | Positive | None = None
    stride: Count | None = None  # instead of fps: every stride-th frame, whatever the rate
    start: Literal["random", "first", "centre"] = "random"  # place of the clip in the record
    # A record shorter than the clip: "error" refuses it, "hold" repeats its last frame, "loop"
    # begins again.
    short: Literal["error", "hold", "loop"] = "error"
    # Frames that must be enlarged to cover the clip: "error" refuses the record, since enlarged
    # footage teaches blur; "enlarge" accepts it.
    small: Literal["error", "enlarge"] = "error"
    flow_points: Index = 0  # pixels whose optical flow is given as a hint; 0: all of them

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range, or that do not fit together."""
        where = "config.data.clip"
        check_fields(self, where)
        if (self.fps is None) == (self.stride is None):
            raise ConfigError(
                f"{where} needs either fps or stride: fps = {self.fps}, stride = {self.stride}."
            )
        if not self.lengths:
            raise ConfigError(f"{where}.num_frames is empty: give one or more lengths.")
        if self.fps is not None and not self.rates:
            raise ConfigError(f"{where}.fps is empty: give one or more rates.")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of clips in frames, as `make_loader` takes them."""
        if isinstance(self.num_frames, int):
            return (self.num_frames,)
        return tuple(self.num_frames)

    @property
    def rates(self) -> tuple[float, ...]:
        """Frame rates of which each clip draws one; empty with a stride."""
        if self.fps is None:
            return ()
        if isinstance(self.fps, int | float):
            return (self.fps,)
        return tuple(self.fps)

    def times(
        self, record: Record, num_frames: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """Return instants of a clip, float64 [t] in seconds, and frames per second.

        Raises BadRecord if the record is too short or too slow.
        """
        if self.stride is None:
            return self._times_at_rate(record, num_frames, rng)
        if record.timestamps is None:
            raise ValueError(f"{record.key} has no frames of its own to stride over: set fps.")
        return self._times_by_stride(record, record.timestamps, self.stride, num_frames, rng)

    def frames_available(self, record: Record) -> int:
        """Return the length of the longest clip that a record fills, in frames.

        Raises BadRecord if the record is too slow.
        """
        stamps = record.timestamps
        if self.stride is not None and stamps is not None:
            return (len(stamps) - 1) // self.stride + 1
        return max(_frames_at(record, rate) for rate in self._possible_rates(record))

    def _times_at_rate(
        self, record: Record, num_frames: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """Return the instants and the rate of a clip at one of the rates."""
        stamps = record.timestamps
        fps = self._draw_rate(record, num_frames, rng)
        available = _frames_at(record, fps)
        if num_frames > available:
            self._check_short(record, f"{num_frames / fps:.3g} s", f"{available / fps:.3g} s")

        # Frames of the footage at a fixed step, whatever the rounding of their timestamps.
        step = _step_of(record, fps)
        if stamps is not None and step is not None:
            starts = len(stamps) - math.ceil(num_frames * step) + 1
            return stamps[self._frames(len(stamps), step, starts, num_frames, rng)], fps

        # A record that is shorter than the clip repeats.
        times = np.arange(num_frames) / fps
        if num_frames > available:
            if self.short == "loop":
                return times % record.duration, fps
            last = record.duration - END_MARGIN if stamps is None else stamps[-1]
            return np.minimum(times, last), fps

        # Else the clip starts anywhere in the room that remains, on a frame if there are frames.
        room = max(record.duration - num_frames / fps, 0.0)
        if stamps is None:
            return times + room * self._start_fraction(rng), fps
        on_frames = stamps[stamps <= room + ROUNDING]
        return times + on_frames[self._pick_start(len(on_frames), rng)], fps

    def _possible_rates(self, record: Record) -> tuple[float, ...]:
        """Return the rates that the footage has; above its own, frames would repeat.

        Raises BadRecord if there is none.
        """
        if record.timestamps is None or len(record.timestamps) < 2:
            return self.rates
        footage_rate = 1 / np.mean(np.diff(record.timestamps))
        rates = tuple(rate for rate in self.rates if rate <= footage_rate * RATE_SLACK)
        if not rates:
            raise BadRecord(
                record.key,
                f"too slow: needs {min(self.rates):g} frames per second, has {footage_rate:.4g}",
            )
        return rates

    def _draw_rate(self, record: Record, num_frames: int, rng: np.random.Generator) -> float:
        """Draw one of the rates that the footage has.

        Rates at which the footage fills the clip go first. Raises BadRecord if it has none.
        """
        rates = self._possible_rates(record)
        filled = tuple(rate for rate in rates if num_frames <= _frames_at(record, rate))
        rates = filled or rates
        return float(rates[rng.integers(len(rates))])

    def _times_by_stride(
        self,
        record: Record,
        stamps: np.ndarray,
        stride: int,
        num_frames: int,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, float]:
        """Return the instants of every stride-th frame, and the mean rate that results."""
        needed = (num_frames - 1) * stride + 1
        if needed > len(stamps):
            self._check_short(record, f"{needed} frames", f"{len(stamps)}")
        starts = len(stamps) - needed + 1
        index = self._frames(len(stamps), Fraction(stride), starts, num_frames, rng)

        interval = stride * record.duration / len(stamps)  # seconds, the mean over the record
        if starts > 0 and num_frames > 1:
            interval = float(np.mean(np.diff(stamps[index])))
        return stamps[index], float(1 / interval)

    def _frames(
        self, count: int, step: Fraction, starts: int, num_frames: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Return the frames int [t] of a clip, of footage with `count` frames.

        starts: how many frames the clip may start on; without one the footage repeats.
        """
        index = np.arange(num_frames) * step.numerator // step.denominator
        if starts > 0:
            return index + self._pick_start(starts, rng)
        if self.short == "loop":
            return index % count
        return np.minimum(index, count - 1)

    def _check_short(self, record: Record, needs: str, has: str) -> None:
        """Raise BadRecord if a record that is too short is an error."""
        if self.short == "error":
            raise BadRecord(record.key, f"too short: needs {needs}, has {has}")

    def _pick_start(self, count: int, rng: np.random.Generator) -> int:
        """Return one of `count` places to start."""
        return min(int(self._start_fraction(rng) * count), count - 1)

    def _start_fraction(self, rng: np.random.Generator) -> float:
        """Return where in the room to start, in [0, 1); always draws one random number."""
        drawn = rng.random()
        return {"random": drawn, "first": 0.0, "centre": 0.5}[self.start]


def to_example(
    record: Record,
    *,
    clip: ClipSampling,
    height: int,
    width: int,
    tokenize: Tokenize,
    num_frames: int,
    rng: np.random.Generator,
    signals: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return one training example, without the batch axis.

    `make_loader` takes a partial of it.
    signals: rows of `vdx.data.signals.SIGNALS`, each of which adds an entry of its name.

    Keys: video uint8 [t height width 3], text int32 [l], text_mask bool [l], fps float32,
    num_frames int32, key (str, for messages), and the signals. Raises BadRecord if the record
    cannot be used, and ConfigError for an unknown signal.
    """
    times, fps = clip.times(record, num_frames, rng)
    video, size = _read_resized(record, times, clip, height, width)
    if len(video) != num_frames:
        raise BadRecord(record.key, f"gave {len(video)} frames, expected {num_frames}")

    # The clip itself, and the signals that belong to it.
    text, mask = tokenize(record.caption)
    source = Clip(
        record=record,
        times=times,
        fps=fps,
        video=video,
        size=size,
        flow_points=clip.flow_points,
        rng=rng,
    )
    return {
        "video": video,
        "text": np.asarray(text),
        "text_mask": np.asarray(mask, bool),
        "fps": np.float32(fps),
        "num_frames": np.int32(num_frames),
        "key": record.key,
        **read_signals(signals, source),
    }


def _read_resized(
    record: Record, times: np.ndarray, clip: ClipSampling, height: int, width: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return (frames [t height width 3] of a record, size of its footage).

    Frames are resized one by one: a clip of large footage would fill the memory.
    """
    size = (height, width)  # of the footage, once a frame is decoded

    def fit(frame: np.ndarray) -> np.ndarray:
        nonlocal size
        _check_frame(record, frame)
        size = frame.shape[:2]
        if clip.small == "error":
            _check_size(record, size, height, width)
        return resize(frame[None], height, width)[0]

    video = record.read_frames(times, fit)
    return video, size


def _frames_at(record: Record, fps: float) -> int:
    """Return how many frames a clip at `fps` may have, from start to end of a record."""
    step = _step_of(record, fps)
    if record.timestamps is None or step is None:
        return int((record.duration + ROUNDING) * fps)
    return len(record.timestamps) // step


def _step_of(record: Record, fps: float) -> Fraction | None:
    """Return `frame_step` of a record; None if its last frame stays longer."""
    stamps = record.timestamps
    if stamps is None or len(stamps) < 2:
        return None
    interval = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    if record.duration - stamps[-1] > 1.5 * interval:
        return None
    return frame_step(stamps, fps)


def _check_frame(record: Record, frame: np.ndarray) -> None:
    """Raise BadRecord unless a frame is uint8 [h w 3]."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
        raise BadRecord(
            record.key, f"gave frames {frame.dtype} {frame.shape}, expected uint8 (h, w, 3)"
        )


def _check_size(record: Record, size: tuple[int, int], height: int, width: int) -> None:
    """Raise BadRecord if the frames are smaller than the clip."""
    found_height, found_width = size
    if max(height / found_height, width / found_width) > 1:
        raise BadRecord(
            record.key,
            f"too small: {found_height}x{found_width} would be enlarged to cover {height}x{width}",
        )
