"""Files beside a clip that hold what steers it, and what of them a clip takes.

A row of `metadata.jsonl` names them under the name of the track:

    depth      .npy [frames h w] in [0, 1] (or uint8), 1 the nearest; or a grey video
    pose       .npy [frames h w 3] in [0, 1] (or uint8); or a video
    flow       .npy [frames h w 2]: pixels of this map to the next frame, x to the right, y down
    camera     .json, as `vdx.data.camera` says
    actions    .json, a list of rows of ACTIONS or their names, one a frame
    reference  a picture: .png .jpg .jpeg .webp

A file that is not a picture or a video has an entry for each frame of the clip. A video is read
at the instants of the clip, whatever its own frame rate.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vdx.config.build import lookup
from vdx.data.camera import read_camera
from vdx.data.signals import ACTIONS
from vdx.data.video_files import VIDEOS
from vdx.files import read_json

__all__ = ["TRACK_FILES"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp")

Video = Callable[[], np.ndarray]  # uint8 [t h w 3]: the file, if it is one, at the clip's instants


def _rows(values: Any, at: np.ndarray, frames: int) -> np.ndarray:
    """The entries of the frames `at` [t], in memory."""
    if len(values) != frames:
        raise ValueError(f"has {len(values)} entries, and the clip has {frames} frames")
    return np.asarray(values[at])


def _array(path: Path, at: np.ndarray, frames: int, channels: int | None = None) -> np.ndarray:
    """[t h w], or [t h w channels], of an array file."""
    _expect(path, (".npy",))
    whole = np.load(path, mmap_mode="r", allow_pickle=False)  # frames that are not shown stay out
    if (whole.ndim, *whole.shape[3:]) != ((4, channels) if channels else (3,)):
        raise ValueError(
            f"holds {list(whole.shape)}, expected [frames h w{f' {channels}' if channels else ''}]"
        )
    if whole.dtype.kind not in "fu":
        raise ValueError(f"holds {whole.dtype}, expected floats or uint8")
    rows = _rows(whole, at, frames)
    if not np.isfinite(rows).all():
        raise ValueError("holds numbers that are not finite")
    return rows


def _expect(path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"expected a file {' '.join(suffixes)}")


def _unit(values: np.ndarray) -> np.ndarray:
    """float32 in [0, 1], of levels or of numbers that are already."""
    if values.dtype == np.uint8:
        return values.astype(np.float32) / np.float32(255.0)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"holds {values.min():.4g} to {values.max():.4g}, expected [0, 1]")
    return values.astype(np.float32)


def _depth(path: Path, at: np.ndarray, frames: int, video: Video) -> np.ndarray:
    if path.suffix.lower() in VIDEOS:
        return _unit(video()).mean(-1, keepdims=True)
    return _unit(_array(path, at, frames))[..., None]


def _pose(path: Path, at: np.ndarray, frames: int, video: Video) -> np.ndarray:
    if path.suffix.lower() in VIDEOS:
        return _unit(video())
    return _unit(_array(path, at, frames, 3))


def _flow(path: Path, at: np.ndarray, frames: int, video: Video) -> np.ndarray:
    flow = _array(path, at, frames, 2).astype(np.float32)
    # Where the clip leaves frames out, what moves is taken to go on as it does.
    steps = np.maximum(np.append(np.diff(at), 0), 0).astype(np.float32)
    return flow * steps[:, None, None, None]


def _camera(path: Path, at: np.ndarray, frames: int, video: Video) -> np.ndarray:
    return np.concatenate(read_camera(path, frames), axis=-1)[at]


def _actions(path: Path, at: np.ndarray, frames: int, video: Video) -> np.ndarray:
    _expect(path, (".json",))
    values = read_json(path)
    if not isinstance(values, list):
        raise ValueError(f"expected a list of rows of {', '.join(ACTIONS)} or their numbers")
    known = {key: i for i, name in enumerate(ACTIONS) for key in (name, str(i))}
    rows = [lookup(str(value), known, f"entry {i}") for i, value in enumerate(values)]
    return _rows(np.array(rows, np.int32), at, frames)


def _reference(path: Path, at: np.ndarray, frames: int, video: Video) -> np.ndarray:
    _expect(path, PICTURES)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))[None]


# read(file, frames of the clip that are shown [t], how many the clip has, video) -> the track in
# the format of `vdx.data.signals`. Raises ValueError, OSError and what decoders raise.
TRACK_FILES: dict[str, Callable[[Path, np.ndarray, int, Video], np.ndarray]] = {
    "depth": _depth,
    "pose": _pose,
    "flow": _flow,
    "camera": _camera,
    "actions": _actions,
    "reference": _reference,
}
