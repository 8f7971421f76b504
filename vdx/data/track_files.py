"""Files of control signals of a video, read at the instants of a clip.

A row of `metadata.jsonl` names them under the name of the track:

    depth      .npy [frames h w] in [0, 1], 1 the nearest; or a grey video or image
    pose       .npy [frames h w 3] in [0, 1]; or a video or image
    flow       .npy [frames h w 2]: pixels of this map to the next frame, x to the right, y down
    camera     .json in the format of `vdx.data.camera`
    actions    .json, a list of indices into ACTIONS or their names, one a frame
    reference  an image

An array of uint8 is divided by 255, one of uint16 by 65,535. A file that is not an image or a video
has an entry for each frame of the clip. A video, or an animated image, is read at the instants of
the clip, whatever its own frame rate. An image is the map of all frames.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vdx.config.build import lookup
from vdx.data.animation import is_animation
from vdx.data.camera import read_camera
from vdx.data.images import SUFFIXES, read_image, read_map, to_unit
from vdx.data.signals import ACTIONS
from vdx.data.video_files import VIDEOS
from vdx.files import check_regular_file, read_json, read_npy

__all__ = ["TRACK_FILES", "is_moving"]

# Returns uint8 [t h w 3]: the file, if it is a video, at the instants of the clip.
ReadVideo = Callable[[], np.ndarray]


def _check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise ValueError for a file of another kind, or what is no file at all."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"expected a file {' '.join(suffixes)}")
    check_regular_file(path)


def _take(values: np.ndarray, index: np.ndarray, frames: int) -> np.ndarray:
    """Return the entries of the frames `index` [t], in memory."""
    if len(values) != frames:
        raise ValueError(f"has {len(values)} entries, and the clip has {frames} frames")
    return np.asarray(values[index])


def _read_maps(
    path: Path, index: np.ndarray, frames: int, channels: int | None = None
) -> np.ndarray:
    """Return [t h w], or [t h w channels], of an array file."""
    _check_suffix(path, (".npy",))
    # Mapped into memory: frames that the clip leaves out are never read.
    array = read_npy(path)

    # [frames h w], or with channels [frames h w channels]
    expected = "[frames h w]" if channels is None else f"[frames h w {channels}]"
    fits = array.ndim == 3 if channels is None else array.shape[3:] == (channels,)
    if not fits:
        raise ValueError(f"holds {list(array.shape)}, expected {expected}")
    if array.dtype.kind not in "fu":
        raise ValueError(f"holds {array.dtype}, expected floats, uint8 or uint16")

    maps = _take(array, index, frames)
    if not np.isfinite(maps).all():
        raise ValueError("holds numbers that are not finite")
    return maps


def is_moving(path: Path) -> bool:
    """Return whether a file is a video or an animated image. Raises ValueError."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return is_animation(path)
    return suffix in VIDEOS


def _depth(path: Path, index: np.ndarray, frames: int, video: ReadVideo) -> np.ndarray:
    """Return nearness, float32 [t h w 1]."""
    if is_moving(path):
        return to_unit(video()).mean(-1, keepdims=True)
    if path.suffix.lower() in SUFFIXES:
        nearness = read_map(path)[None, ..., None]
        return np.repeat(nearness, len(index), axis=0)
    return to_unit(_read_maps(path, index, frames))[..., None]


def _pose(path: Path, index: np.ndarray, frames: int, video: ReadVideo) -> np.ndarray:
    """Return images of the skeleton, float32 [t h w 3]."""
    if is_moving(path):
        return to_unit(video())
    if path.suffix.lower() in SUFFIXES:
        return np.repeat(to_unit(read_image(path))[None], len(index), axis=0)
    return to_unit(_read_maps(path, index, frames, 3))


def _flow(path: Path, index: np.ndarray, frames: int, video: ReadVideo) -> np.ndarray:
    """Return flow from each frame of the clip to the next, float32 [t h w 2]."""
    flow = _read_maps(path, index, frames, 2).astype(np.float32)
    # Where the clip leaves frames out, motion is assumed to continue at the same velocity.
    steps = np.maximum(np.append(np.diff(index), 0), 0).astype(np.float32)
    return flow * steps[:, None, None, None]


def _camera(path: Path, index: np.ndarray, frames: int, video: ReadVideo) -> np.ndarray:
    """Return intrinsics and extrinsics, float64 [t 3 7]."""
    return np.concatenate(read_camera(path, frames), axis=-1)[index]


def _actions(path: Path, index: np.ndarray, frames: int, video: ReadVideo) -> np.ndarray:
    """Return indices into ACTIONS, int32 [t]."""
    _check_suffix(path, (".json",))
    values = read_json(path)
    if not isinstance(values, list):
        raise ValueError(f"expected a list of rows of {', '.join(ACTIONS)} or their numbers")
    names = {name: i for i, name in enumerate(ACTIONS)}
    numbers = {str(i): i for i in range(len(ACTIONS))}
    known = names | numbers
    actions = [lookup(str(value), known, f"entry {i}") for i, value in enumerate(values)]
    return _take(np.array(actions, np.int32), index, frames)


def _reference(path: Path, index: np.ndarray, frames: int, video: ReadVideo) -> np.ndarray:
    """Return the image of the subject, uint8 [1 h w 3]."""
    return read_image(path)[None]


# read(file, index, frames, video) -> the track in the format of `vdx.data.signals`.
# index: int [t], the frames of the footage that are on the screen at the instants of the clip.
# frames: number of frames of the footage. Raises ValueError, OSError and what decoders raise.
TRACK_FILES: dict[str, Callable[[Path, np.ndarray, int, ReadVideo], np.ndarray]] = {
    "depth": _depth,
    "pose": _pose,
    "flow": _flow,
    "camera": _camera,
    "actions": _actions,
    "reference": _reference,
}
