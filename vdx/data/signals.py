"""Entries of an example that steer a clip, beside its frames: what a network is conditioned on.

Tracks of a Record, `read(times)` with times float64 [t]; [h w] may be any size with the frames'
aspect:
  depth      float32 [t h w 1], nearness: 1 the nearest there is, 0 the farthest
  pose       float32 [t h w 3], a picture of the skeleton in [0, 1]
  flow       float32 [t h w 2], (dx, dy) in pixels of the map from each instant to the next one
  camera     float64 [t 3 7], intrinsics [3 3] and extrinsics [3 4] side by side (vdx.data.camera)
  actions    int32 [t], rows of ACTIONS: what is done from each instant to the next one
  reference  uint8 [1 h w 3], a picture of the subject, whatever the times

To add a signal, write a function and a row of SIGNALS.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from vdx.config.build import lookup
from vdx.data.camera import cropped, plucker
from vdx.data.motion import motion_score
from vdx.data.record import BadRecord, Record
from vdx.data.resize import covering, resize

__all__ = ["ACTIONS", "SIGNALS", "Clip", "read_signals", "sparse_flow_hints"]

ACTIONS = ("stay", "left", "right", "up", "down")
ASPECT = 0.02  # by which the aspect of a map may differ from that of the frames


@dataclasses.dataclass(frozen=True)
class Clip:
    """Where signals are read: a record, the instants [t], and the clip made of it.

    video: uint8 [t height width 3]; size: (h, w) of the frames before they were resized;
    flow_points: see ClipSampling.
    """

    record: Record
    times: np.ndarray
    fps: float
    video: np.ndarray
    size: tuple[int, int]
    flow_points: int
    rng: np.random.Generator

    def track(self, name: str, kind: type, *shape: int | None) -> np.ndarray:
        """The track as an array whose shape after the time axis is `shape`, None for any."""
        if name not in self.record.tracks:
            raise BadRecord(
                self.record.key,
                f"has no {name}; it has {', '.join(self.record.tracks) or 'no tracks'}",
            )
        found = self.record.tracks[name](self.times)
        expected = (1 if name == "reference" else len(self.times), *shape)
        if (
            found.dtype != kind
            or found.ndim != len(expected)
            or any(n not in (None, m) for n, m in zip(expected, found.shape, strict=True))
        ):
            raise BadRecord(
                self.record.key,
                f"gave {name} {found.dtype} {list(found.shape)}, "
                f"expected {np.dtype(kind)} {[n or 'any' for n in expected]}",
            )
        return found

    def map(self, name: str, channels: int) -> tuple[np.ndarray, float]:
        """(a map in the clip's own size, its pixels to one of the track's)."""
        found = self.track(name, np.float32, None, None, channels)
        (h, w), (height, width) = found.shape[1:3], self.size
        if abs(h * width - w * height) > ASPECT * h * width:
            raise BadRecord(
                self.record.key,
                f"{name} is {h}x{w}, which is not the shape of the frames, {height}x{width}",
            )
        size = self.video.shape[1:3]
        return resize(found, *size), covering((h, w), *size)[1]


def _depth(clip: Clip) -> np.ndarray:
    return clip.map("depth", 1)[0]


def _pose(clip: Clip) -> np.ndarray:
    return clip.map("pose", 3)[0]


def _flow(clip: Clip) -> np.ndarray:
    flow, scale = clip.map("flow", 2)
    return sparse_flow_hints(flow * np.float32(scale), clip.flow_points, clip.rng)


def sparse_flow_hints(flow: np.ndarray, points: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [t h w 3]: flow [t h w 2], and 1 where it is told; where it is not, all is 0.

    points: how many, that start in the first frame, more of them where much moves, and are
    followed until they leave it; 0: all pixels. Of the last frame, which has no next one,
    nothing is told.
    """
    t, h, w, _ = flow.shape
    hint = np.zeros((t, h, w, 1), np.float32)
    if not points:
        hint[:-1] = 1.0
    else:
        far = np.hypot(*np.moveaxis(flow[0], -1, 0)).ravel().astype(np.float64)
        weight = far + far.mean() + 1e-6
        start = rng.choice(h * w, min(points, h * w), replace=False, p=weight / weight.sum())
        x, y = start % w + 0.5, start // w + 0.5
        for i in range(t - 1):
            inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
            x, y = x[inside], y[inside]
            at = i, y.astype(int), x.astype(int)
            hint[at] = 1.0
            x, y = x + flow[at][:, 0], y + flow[at][:, 1]
    return np.concatenate([flow * hint, hint], axis=-1)


def _camera(clip: Clip) -> np.ndarray:
    cameras = clip.track("camera", np.float64, 3, 7)
    size = clip.video.shape[1:3]
    return plucker(cropped(cameras[..., :3], clip.size, *size), cameras[..., 3:], *size)


def _actions(clip: Clip) -> np.ndarray:
    return clip.track("actions", np.int32)


def _motion(clip: Clip) -> np.ndarray:
    return np.array(motion_score(clip.video, clip.fps), np.float32)


def _reference(clip: Clip) -> np.ndarray:
    """The record's own picture of its subject, or else any of its frames."""
    record, rng = clip.record, clip.rng
    if "reference" in record.tracks:
        picture = clip.track("reference", np.uint8, None, None, 3)
    else:
        stamps = record.timestamps
        at = rng.random() * record.duration if stamps is None else rng.choice(stamps)
        picture = record.read(np.array([at]))
    return resize(picture, *clip.video.shape[1:3])[0]


def read_signals(names: Iterable[str], clip: Clip) -> dict[str, np.ndarray]:
    """{name: array} of rows of SIGNALS, without the batch axis. Raises BadRecord if the record
    has no such track, or a wrong one; ConfigError for an unknown name."""
    return {name: lookup(name, SIGNALS, "signals")(clip) for name in names}


# depth float32 [t h w 1], pose float32 [t h w 3], flow float32 [t h w 3], camera float32 [t h w 6],
# actions int32 [t], motion float32 [], reference uint8 [h w 3]; h and w are those of the clip.
SIGNALS: dict[str, Callable[[Clip], np.ndarray]] = {
    "depth": _depth,
    "pose": _pose,
    "flow": _flow,
    "camera": _camera,
    "actions": _actions,
    "motion": _motion,
    "reference": _reference,
}
