"""Control signals of a training example: depth, pose, flow, camera and others.

A network is conditioned on them in addition to text. They are computed from the tracks of a
Record, `read(times)` with times float64 [t] in seconds. [h w] of a track may be any size with the
frames' aspect:
  depth      float32 [t h w 1], nearness: 1 is the nearest in the clip, 0 the farthest
  pose       float32 [t h w 3], an image of the skeleton in [0, 1]
  flow       float32 [t h w 2], (dx, dy) in pixels of the map from each instant to the next one
  camera     float64 [t 3 7], intrinsics [3 3] then extrinsics [3 4] (vdx.data.camera)
  actions    int32 [t], indices into ACTIONS: the action from each instant to the next one
  reference  uint8 [1 h w 3], an image of the subject, whatever the times

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
ASPECT = 0.02  # relative difference allowed between the aspect of a map and that of the frames


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip whose signals are read, and the record it was made of."""

    record: Record
    times: np.ndarray  # float64 [t], instants in seconds
    fps: float  # frames per second
    video: np.ndarray  # uint8 [t height width 3], after resizing
    size: tuple[int, int]  # (h, w) of the frames before resizing
    flow_points: int  # see ClipSampling
    rng: np.random.Generator

    def track(self, name: str, dtype: type, *shape: int | None) -> np.ndarray:
        """Return a track as an array whose shape after the time axis is `shape`.

        None in `shape` stands for any size. Raises BadRecord if the record has no such track, or
        one of another dtype or shape.
        """
        tracks = self.record.tracks
        if name not in tracks:
            raise BadRecord(
                self.record.key, f"has no {name}; it has {', '.join(tracks) or 'no tracks'}"
            )

        # Compare with the shape and dtype that are expected.
        found = tracks[name](self.times)
        expected = (1 if name == "reference" else len(self.times), *shape)
        fits = found.ndim == len(expected) and all(
            want in (None, have) for want, have in zip(expected, found.shape, strict=True)
        )

        if found.dtype != dtype or not fits:
            raise BadRecord(
                self.record.key,
                f"gave {name} {found.dtype} {list(found.shape)}, "
                f"expected {np.dtype(dtype)} {[size or 'any' for size in expected]}",
            )
        return found

    def map(self, name: str, channels: int) -> tuple[np.ndarray, float]:
        """Return a map at the size of the clip, and the scale of its pixels.

        The scale is the number of pixels of the map to one of the track.
        Raises BadRecord if the aspect of the track is not that of the frames.
        """
        found = self.track(name, np.float32, None, None, channels)
        h, w = found.shape[1:3]
        height, width = self.size
        if abs(h * width - w * height) > ASPECT * h * width:
            raise BadRecord(
                self.record.key,
                f"{name} is {h}x{w}, which is not the shape of the frames, {height}x{width}",
            )
        clip_height, clip_width = self.video.shape[1:3]
        _, scale = covering((h, w), clip_height, clip_width)
        return resize(found, clip_height, clip_width), scale


def _depth(clip: Clip) -> np.ndarray:
    """Return nearness, float32 [t height width 1]."""
    return clip.map("depth", 1)[0]


def _pose(clip: Clip) -> np.ndarray:
    """Return images of the skeleton, float32 [t height width 3]."""
    return clip.map("pose", 3)[0]


def _flow(clip: Clip) -> np.ndarray:
    """Return flow in pixels of the clip and its mask, float32 [t height width 3]."""
    flow, scale = clip.map("flow", 2)
    return sparse_flow_hints(flow * np.float32(scale), clip.flow_points, clip.rng)


def sparse_flow_hints(flow: np.ndarray, points: int, rng: np.random.Generator) -> np.ndarray:
    """Return flow at the hinted pixels and a mask of them: float32 [t h w 3].

    All other pixels are 0.

    flow: [t h w 2], (dx, dy) in pixels to the next frame.
    points: number of hints. They start in the first frame, more of them where much moves, and
      follow the flow until they leave the frame. 0 hints every pixel.

    The last frame, which has no next one, has no hints.
    """
    t, h, w, _ = flow.shape
    mask = np.zeros((t, h, w, 1), np.float32)

    if not points:
        mask[:-1] = 1.0
        return np.concatenate([flow * mask, mask], axis=-1)

    # Starts: a pixel's weight grows with its speed, and no pixel has the weight 0.
    speed = np.hypot(*np.moveaxis(flow[0], -1, 0)).ravel().astype(np.float64)
    weight = speed + speed.mean() + 1e-6
    start = rng.choice(h * w, min(points, h * w), replace=False, p=weight / weight.sum())
    x = start % w + 0.5
    y = start // w + 0.5

    # Each point moves with the flow of its pixel until it leaves the frame.
    for frame in range(t - 1):
        inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
        x = x[inside]
        y = y[inside]
        at = frame, y.astype(int), x.astype(int)
        mask[at] = 1.0
        step = flow[at]
        x = x + step[:, 0]
        y = y + step[:, 1]
    return np.concatenate([flow * mask, mask], axis=-1)


def _camera(clip: Clip) -> np.ndarray:
    """Return Plücker rays of the cropped frames, float32 [t height width 6]."""
    cameras = clip.track("camera", np.float64, 3, 7)
    intrinsics = cameras[..., :3]
    extrinsics = cameras[..., 3:]
    height, width = clip.video.shape[1:3]
    return plucker(cropped(intrinsics, clip.size, height, width), extrinsics, height, width)


def _actions(clip: Clip) -> np.ndarray:
    """Return indices into ACTIONS, int32 [t]."""
    return clip.track("actions", np.int32)


def _motion(clip: Clip) -> np.ndarray:
    """Return the strength of motion, float32 []."""
    return np.array(motion_score(clip.video, clip.fps), np.float32)


def _reference(clip: Clip) -> np.ndarray:
    """Return the record's image of its subject, uint8 [height width 3].

    A record without one has any of its frames instead.
    """
    record = clip.record
    if "reference" in record.tracks:
        image = clip.track("reference", np.uint8, None, None, 3)
    else:
        if record.timestamps is None:
            time = clip.rng.random() * record.duration
        else:
            time = clip.rng.choice(record.timestamps)
        image = record.read(np.array([time]))
    height, width = clip.video.shape[1:3]
    return resize(image, height, width)[0]


def read_signals(names: Iterable[str], clip: Clip) -> dict[str, np.ndarray]:
    """Return {name: array} of rows of SIGNALS, without the batch axis.

    Raises BadRecord if the record has no such track or a wrong one, and ConfigError for an unknown
    name.
    """
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
