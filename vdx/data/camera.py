"""Cameras as numbers: rays of pixels for a network, and files for people to write.

A camera is an intrinsic matrix [3 3] and a world-to-camera matrix [3 4]. The intrinsics are in
units of the frame, x by its width and y by its height: fx = 1 means that the frame is as wide as
its distance, cx = cy = 0.5 that the axis passes through its middle. In the camera's coordinates x
points right, y down and z into the scene, as in OpenCV and COLMAP.

A file of cameras is JSON, one matrix for each frame:

    {"intrinsics": [fx, fy, cx, cy],
     "frames": [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], ...]}

A zooming clip has a list of intrinsics, one for each frame. Only the motion relative to the first
frame's camera matters. The unit of length is that of the training data.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vdx.data.resize import covering
from vdx.files import read_json, write_json

__all__ = ["cropped", "plucker", "read_camera", "write_camera"]

MAX_ROUNDING = 1e-3  # of R R' - 1 for a rotation matrix R, whose numbers files round
MAX_INTRINSIC = 100  # in units of the frame; larger numbers are pixels
# Where fx, fy, cx, cy stand in an intrinsic matrix.
ROWS = [0, 1, 0, 1]
COLUMNS = [0, 1, 2, 2]


def plucker(intrinsics: np.ndarray, extrinsics: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the ray of each pixel: moment o x d and direction d.

    intrinsics [t 3 3], extrinsics [t 3 4]: see the module. The result is float32
    [t height width 6]. d has length 1 and o is the camera's centre, both in the coordinates of the
    first frame's camera. CameraCtrl (He et al., 2024).
    """
    extrinsics = np.asarray(extrinsics, np.float64)
    rotation = extrinsics[..., :3]  # [t 3 3]
    translation = extrinsics[..., 3]  # [t 3]

    # x_i = R_i x + t_i and x_0 = R_0 x + t_0, so x_i = R_i R_0' x_0 + t_i - R_i R_0' t_0.
    rotation = rotation @ rotation[0].T
    translation = translation - rotation @ translation[0]

    # Directions in the coordinates of each camera.
    parameters = np.asarray(intrinsics, np.float64)[:, ROWS, COLUMNS]  # [t 4]
    fx, fy, cx, cy = np.moveaxis(parameters, 1, 0)
    x = ((np.arange(width) + 0.5) / width - cx[:, None]) / fx[:, None]  # [t width]
    y = ((np.arange(height) + 0.5) / height - cy[:, None]) / fy[:, None]  # [t height]
    d = np.ones((len(rotation), height, width, 3))
    d[..., 0] = x[:, None]
    d[..., 1] = y[:, :, None]
    d /= np.linalg.norm(d, axis=-1, keepdims=True)

    # To the coordinates of the first camera; R leads from the world, so R' is applied.
    d = np.einsum("thwc,tcd->thwd", d, rotation)
    o = -np.einsum("tcd,tc->td", rotation, translation)[:, None, None]
    return np.concatenate([np.cross(o, d), d], axis=-1).astype(np.float32)


def cropped(intrinsics: np.ndarray, old: tuple[int, int], height: int, width: int) -> np.ndarray:
    """Return intrinsics [t 3 3] for frames that `resize` has changed.

    old: (h, w) of the frames before.
    """
    (left, top, right, bottom), _ = covering(old, height, width)

    # The crop is the new unit of length, and its corner the new origin.
    result = np.array(intrinsics, np.float64)
    for row, size, begin, end in ((0, old[1], left, right), (1, old[0], top, bottom)):
        result[:, row] *= size / (end - begin)
        result[:, row, 2] -= begin / (end - begin)
    return result


def write_camera(path: str | Path, intrinsics: np.ndarray, extrinsics: np.ndarray) -> None:
    """Write intrinsics [t 3 3] and extrinsics [t 3 4] as a file of cameras."""
    parameters = np.asarray(intrinsics, np.float64)[:, ROWS, COLUMNS]  # [t 4]
    if (parameters == parameters[0]).all():
        parameters = parameters[0]
    frames = np.asarray(extrinsics, np.float64)
    write_json(path, {"intrinsics": parameters.tolist(), "frames": frames.tolist()})


def read_camera(path: str | Path, frames: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return intrinsics float64 [t 3 3] and extrinsics float64 [t 3 4] of a file.

    frames: number of cameras that are needed. Raises ValueError that names the file and the fault.
    """
    found = read_json(path)
    if not isinstance(found, dict) or not {"intrinsics", "frames"} <= set(found):
        raise ValueError(
            f'{path}: expected {{"intrinsics": [fx, fy, cx, cy], "frames": '
            "[3 x 4 matrix, ...]}; see vdx.data.camera."
        )
    extrinsics = _parse_extrinsics(path, found["frames"], frames)
    parameters = _parse_intrinsics(path, found["intrinsics"], len(extrinsics))

    matrices = np.zeros((len(extrinsics), 3, 3))
    matrices[:, ROWS, COLUMNS] = parameters
    matrices[:, 2, 2] = 1.0
    return matrices, extrinsics


def _parse_extrinsics(path: str | Path, value: Any, frames: int | None) -> np.ndarray:
    """Return "frames" of a file as float64 [t 3 4].

    frames: number of cameras needed. Raises ValueError for a matrix that is no camera.
    """
    extrinsics = _parse_array(path, "frames", value)
    if extrinsics.ndim != 3 or extrinsics.shape[1:] != (3, 4):
        raise ValueError(
            f'{path}: "frames" is {list(extrinsics.shape)}, expected one '
            "world-to-camera matrix of 3 rows and 4 columns for each frame."
        )
    if frames is not None and len(extrinsics) != frames:
        raise ValueError(f"{path} has {len(extrinsics)} cameras, and the clip has {frames} frames.")

    for i, rotation in enumerate(extrinsics[..., :3]):
        error = np.abs(rotation @ rotation.T - np.eye(3)).max()
        if error > MAX_ROUNDING or np.linalg.det(rotation) < 0:
            raise ValueError(f"{path}: the first three columns of frame {i} are no rotation.")
    return extrinsics


def _parse_intrinsics(path: str | Path, value: Any, frames: int) -> np.ndarray:
    """Return "intrinsics" of a file as float64 [4] or [t 4].

    Raises ValueError for another shape, or numbers in pixels.
    """
    parameters = _parse_array(path, "intrinsics", value)
    if parameters.shape not in ((4,), (frames, 4)):
        raise ValueError(
            f'{path}: "intrinsics" is {list(parameters.shape)}, expected [fx, fy, cx, cy], '
            f"or {frames} of them, one for each frame."
        )
    if (parameters[..., :2] <= 0).any() or (parameters > MAX_INTRINSIC).any():
        raise ValueError(
            f'{path}: "intrinsics" {parameters.reshape(-1, 4)[0].tolist()} are not in units '
            "of the frame: divide fx and cx by its width, fy and cy by its height."
        )
    return parameters


def _parse_array(path: str | Path, name: str, value: Any) -> np.ndarray:
    """Return a JSON value as a float64 array.

    Raises ValueError if it is empty, ragged or not finite.
    """
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f'{path}: "{name}" is not a list of equally long lists of numbers.'
        ) from None
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f'{path}: "{name}" is empty or not finite.')
    return array
