"""From a record to a training example: which instants, at which size, with which tokens.

No horizontal flip is offered: captions say left and right.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from vdx.data.record import BadRecord, Record
from vdx.data.resize import resize
from vdx.data.signals import Clip, read_signals

__all__ = ["ClipSampling", "Tokenize", "to_example"]

Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]

STARTS = ("random", "first", "centre")
SHORT = ("error", "hold", "loop")
SMALL = ("error", "enlarge")
_ROUNDING = 1e-3  # seconds; containers round timestamps by as much
_RATE_SLACK = 1.01  # 23.976 frames per second pass for 24


@dataclasses.dataclass(frozen=True)
class ClipSampling:
    """Which instants of a record become the frames of a clip.

    num_frames: the lengths of clips; each batch has one of them.
    fps: frames per second of the clip, or several of which each clip draws one. Only rates up
      to the footage's own are drawn, above it frames would repeat and the motion stutter; and
      of these those at which the footage fills the clip, if there are any.
    stride: instead of fps, every stride-th frame of the footage, whatever its rate.
    start: "random", "first" or "centre".
    short: what to do with a record shorter than the clip: "error" refuses it, "hold" repeats
      its last frame, "loop" begins again.
    small: what to do with frames that would have to be enlarged to cover the clip: "error"
      refuses the record, since enlarged footage teaches blur; "enlarge" takes it.
    flow_points: of the flow that steers a clip, how many points are told; 0: all of it.
    """

    num_frames: tuple[int, ...] | int
    fps: tuple[float, ...] | float | None = None
    stride: int | None = None
    start: str = "random"
    short: str = "error"
    small: str = "error"
    flow_points: int = 0

    def __post_init__(self):
        if (self.fps is None) == (self.stride is None):
            raise ValueError(
                "ClipSampling needs either fps or stride: "
                f"fps = {self.fps}, stride = {self.stride}."
            )
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"num_frames = {self.num_frames}: give positive lengths.")
        if min(self.rates, default=1.0) <= 0 or (self.stride is not None and self.stride < 1):
            raise ValueError(f"fps = {self.fps} and stride = {self.stride} must be positive.")
        if self.flow_points < 0:
            raise ValueError(f"flow_points = {self.flow_points} cannot be negative.")
        if self.fps is not None and not self.rates:
            raise ValueError("fps is empty: give one or more rates.")
        for name, value, known in (
            ("start", self.start, STARTS),
            ("short", self.short, SHORT),
            ("small", self.small, SMALL),
        ):
            if value not in known:
                raise ValueError(f"{name} = {value!r} is none of {', '.join(known)}.")

    @property
    def lengths(self) -> tuple[int, ...]:
        """num_frames as a tuple, as `make_loader` takes it."""
        return (self.num_frames,) if isinstance(self.num_frames, int) else tuple(self.num_frames)

    @property
    def rates(self) -> tuple[float, ...]:
        if self.fps is None:
            return ()
        return (self.fps,) if isinstance(self.fps, int | float) else tuple(self.fps)

    def times(
        self, record: Record, num_frames: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """(float64 seconds [t], frames per second); raises BadRecord if the record is short."""
        if self.stride is None:
            return self._at_rate(record, num_frames, rng)
        if record.timestamps is None:
            raise ValueError(f"{record.key} has no frames of its own to stride over: set fps.")
        return self._by_stride(record, record.timestamps, num_frames, rng)

    def _at_rate(self, record, num_frames, rng) -> tuple[np.ndarray, float]:
        stamps = record.timestamps
        fps = self._rate(record, num_frames, rng)
        span = num_frames / fps
        times = np.arange(num_frames) / fps
        if span > record.duration + _ROUNDING:
            self._refuse(record, f"{span:.3g} s", f"{record.duration:.3g} s")
            if self.short == "loop":
                return times % record.duration, fps
            last = record.duration - 1e-6 if stamps is None else stamps[-1]
            return np.minimum(times, last), fps
        room = record.duration - span
        if stamps is None:
            return times + max(room, 0.0) * self._fraction(rng), fps
        # Start on a frame: between two, the rounding of timestamps would make motion judder.
        starts = stamps[stamps <= max(room, 0.0) + _ROUNDING]
        return times + starts[self._pick(len(starts), rng)], fps

    def _rate(self, record, num_frames: int, rng) -> float:
        rates = self.rates
        if record.timestamps is not None and len(record.timestamps) > 1:
            most = 1 / np.mean(np.diff(record.timestamps))
            rates = tuple(r for r in rates if r <= most * _RATE_SLACK)
            if not rates:
                raise BadRecord(
                    record.key,
                    f"too slow: needs {min(self.rates):g} frames per second, has {most:.4g}",
                )
        filled = tuple(r for r in rates if num_frames / r <= record.duration + _ROUNDING)
        rates = filled or rates
        return float(rates[rng.integers(len(rates))])

    def _by_stride(self, record, stamps, num_frames, rng) -> tuple[np.ndarray, float]:
        need = (num_frames - 1) * self.stride + 1
        index = np.arange(num_frames) * self.stride
        if need > len(stamps):
            self._refuse(record, f"{need} frames", f"{len(stamps)}")
            loop = self.short == "loop"
            index = index % len(stamps) if loop else np.minimum(index, len(stamps) - 1)
            interval = self.stride * record.duration / len(stamps)
        else:
            index += self._pick(len(stamps) - need + 1, rng)
            interval = (
                np.mean(np.diff(stamps[index]))
                if num_frames > 1
                else self.stride * record.duration / len(stamps)
            )
        return stamps[index], float(1 / interval)

    def _refuse(self, record, needs: str, has: str) -> None:
        if self.short == "error":
            raise BadRecord(record.key, f"too short: needs {needs}, has {has}")

    def _pick(self, count: int, rng) -> int:
        """One of `count` places to start."""
        return min(int(self._fraction(rng) * count), count - 1)

    def _fraction(self, rng) -> float:
        return {"random": rng.random(), "first": 0.0, "centre": 0.5}[self.start]


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
) -> dict:
    """One example, without the batch axis; `functools.partial` of it is for `make_loader`.

    tokenize: caption -> (ids int32 [l], mask bool [l]). signals: rows of
    `vdx.data.signals.SIGNALS`, each of which adds an entry of its name.
    Gives video uint8 [t height width 3], text int32 [l], text_mask bool [l], fps float32,
    num_frames int32, and key (str, for messages). Raises BadRecord; ConfigError for an unknown
    signal.
    """
    times, fps = clip.times(record, num_frames, rng)
    frames = record.read(times)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[::3] != (num_frames, 3):
        raise BadRecord(
            record.key,
            f"gave frames {frames.dtype} {frames.shape}, expected uint8 ({num_frames}, h, w, 3)",
        )
    if clip.small == "error" and max(height / frames.shape[1], width / frames.shape[2]) > 1:
        raise BadRecord(
            record.key,
            f"too small: {frames.shape[1]}x{frames.shape[2]} would be "
            f"enlarged to cover {height}x{width}",
        )
    text, mask = tokenize(record.caption)
    video = resize(frames, height, width)
    return {
        "video": video,
        "text": np.asarray(text),
        "text_mask": np.asarray(mask, bool),
        "fps": np.float32(fps),
        "num_frames": np.int32(num_frames),
        "key": record.key,
        **read_signals(
            signals, Clip(record, times, fps, video, frames.shape[1:3], clip.flow_points, rng)
        ),
    }
