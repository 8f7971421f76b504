"""From a record to a training example: instants, size and tokens of a clip.

There is no horizontal flip: captions say left and right.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from vdx.config.build import ConfigError, check_fields
from vdx.config.ranges import Count, Index, Positive
from vdx.data.record import BadRecord, Record
from vdx.data.resize import resize
from vdx.data.signals import Clip, read_signals

__all__ = ["ClipSampling", "Tokenize", "to_example"]

# tokenize(caption) -> (token ids int32 [l], mask bool [l])
Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]

ROUNDING = 1e-3  # seconds; containers round timestamps by as much
RATE_SLACK = 1.01  # footage of 23.976 frames per second passes for 24
END_MARGIN = 1e-6  # seconds before the end of a procedural clip, where an instant still exists


@dataclasses.dataclass(frozen=True)
class ClipSampling:
    """The choice of a clip's instants in a record; section `data.clip` of a config."""

    num_frames: tuple[Count, ...] | Count  # lengths of clips; each batch has one of them
    # Frames per second of the clip, or several rates, of which each clip draws one. Only rates up
    # to the footage's own are drawn: above it frames would repeat and the motion stutter. Of these,
    # rates at which the footage fills the clip are preferred.
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

    def _times_at_rate(
        self, record: Record, num_frames: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """Return the instants and the rate of a clip at one of the rates."""
        stamps = record.timestamps
        fps = self._draw_rate(record, num_frames, rng)
        span = num_frames / fps
        times = np.arange(num_frames) / fps

        # A record that is shorter than the clip repeats.
        if span > record.duration + ROUNDING:
            self._check_short(record, f"{span:.3g} s", f"{record.duration:.3g} s")
            if self.short == "loop":
                return times % record.duration, fps
            last = record.duration - END_MARGIN if stamps is None else stamps[-1]
            return np.minimum(times, last), fps

        # Else the clip starts anywhere in the room that remains.
        room = max(record.duration - span, 0.0)
        if stamps is None:
            return times + room * self._start_fraction(rng), fps

        # Start on a frame: between two, the rounding of timestamps would make motion judder.
        starts = stamps[stamps <= room + ROUNDING]
        return times + starts[self._pick_start(len(starts), rng)], fps

    def _draw_rate(self, record: Record, num_frames: int, rng: np.random.Generator) -> float:
        """Draw one of the rates that the footage has.

        Rates at which the footage fills the clip go first. Raises BadRecord if it has none.
        """
        rates = self.rates
        # Above the rate of the footage frames would repeat.
        if record.timestamps is not None and len(record.timestamps) > 1:
            footage_rate = 1 / np.mean(np.diff(record.timestamps))
            rates = tuple(rate for rate in rates if rate <= footage_rate * RATE_SLACK)
            if not rates:
                raise BadRecord(
                    record.key,
                    f"too slow: needs {min(self.rates):g} frames per second, "
                    f"has {footage_rate:.4g}",
                )

        # Preferably a rate at which the footage is long enough.
        longest = record.duration + ROUNDING
        filled = tuple(rate for rate in rates if num_frames / rate <= longest)
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
        index = np.arange(num_frames) * stride
        interval = stride * record.duration / len(stamps)  # seconds, the mean over the record

        # A record that is shorter than the clip repeats; a longer one leaves room for the start.
        if needed > len(stamps):
            self._check_short(record, f"{needed} frames", f"{len(stamps)}")
            if self.short == "loop":
                index = index % len(stamps)
            else:
                index = np.minimum(index, len(stamps) - 1)
        else:
            index += self._pick_start(len(stamps) - needed + 1, rng)
            if num_frames > 1:
                interval = float(np.mean(np.diff(stamps[index])))

        return stamps[index], float(1 / interval)

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
    size = (height, width)  # of the footage, once a frame is decoded

    def fit(frame: np.ndarray) -> np.ndarray:
        nonlocal size
        _check_frame(record, frame)
        size = frame.shape[:2]
        if clip.small == "error":
            _check_size(record, size, height, width)
        return resize(frame[None], height, width)[0]

    # Frames are resized one by one: a clip of large footage would fill the memory.
    video = record.read_frames(times, fit)  # [t height width 3]
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
