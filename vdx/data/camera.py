"""Cameras as numbers: rays of each pixel for a network, and files that people can write.

A camera is an intrinsic matrix [3 3] in units of the frame, x by its width and y by its height
(fx 1: the frame is as wide as the distance; cx = cy = 0.5: the axis pierces its middle), and a
world-to-camera matrix [3 4], x right, y down, z into the scene, as OpenCV and COLMAP have it.

A file of cameras is JSON, one matrix for each frame:

    {"intrinsics": [fx, fy, cx, cy],
     "frames": [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], ...]}

where a zooming clip has a list of intrinsics, one for each frame. Only the way from the first
frame's camera to the others matters. The unit of length is that of the training data.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vdx.data.resize import covering
from vdx.files import read_json, write_json

__all__ = ["cropped", "plucker", "read_camera", "write_camera"]

SLACK = 1e-3  # of a rotation matrix, which files round


def plucker(intrinsics: np.ndarray, extrinsics: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 [t height width 6]: moment o x d and direction d of the ray of each pixel.

    intrinsics [t 3 3], extrinsics [t 3 4]: as the module says. d has length 1; o is the camera's
    centre; both in the coordinates of the first frame's camera. CameraCtrl (He et al., 2024).
    """
    turn, move = (np.asarray(extrinsics, np.float64)[..., part] for part in (slice(3), 3))
    # x_i = R_i x + t_i and x_0 = R_0 x + t_0, so x_i = R_i R_0' x_0 + t_i - R_i R_0' t_0.
    turn = turn @ turn[0].T
    move = move - turn @ move[0]
    fx, fy, cx, cy = np.moveaxis(
        np.asarray(intrinsics, np.float64)[:, [0, 1, 0, 1], [0, 1, 2, 2]], 1, 0
    )
    x = ((np.arange(width) + 0.5) / width - cx[:, None]) / fx[:, None]
    y = ((np.arange(height) + 0.5) / height - cy[:, None]) / fy[:, None]
    d = np.ones((len(turn), height, width, 3))
    d[..., 0], d[..., 1] = x[:, None], y[:, :, None]
    d /= np.linalg.norm(d, axis=-1, keepdims=True)
    d = np.einsum("thwc,tcd->thwd", d, turn)  # R' d: R leads from the world
    o = -np.einsum("tcd,tc->td", turn, move)[:, None, None]
    return np.concatenate([np.cross(o, d), d], axis=-1).astype(np.float32)


def cropped(intrinsics: np.ndarray, old: tuple[int, int], height: int, width: int) -> np.ndarray:
    """The intrinsics [t 3 3] once frames of (h, w) `old` are resized as `resize` does it."""
    (left, top, right, bottom), _ = covering(old, height, width)
    result = np.array(intrinsics, np.float64)
    for row, size, begin, end in ((0, old[1], left, right), (1, old[0], top, bottom)):
        result[:, row] *= size / (end - begin)
        result[:, row, 2] -= begin / (end - begin)
    return result


def write_camera(path: str | Path, intrinsics: np.ndarray, extrinsics: np.ndarray) -> None:
    """Writes intrinsics [t 3 3] and extrinsics [t 3 4] as the module says."""
    rows = np.asarray(intrinsics, np.float64)[:, [0, 1, 0, 1], [0, 1, 2, 2]]
    same = bool((rows == rows[0]).all())
    write_json(
        path,
        {
            "intrinsics": (rows[0] if same else rows).tolist(),
            "frames": np.asarray(extrinsics, np.float64).tolist(),
        },
    )


def read_camera(path: str | Path, frames: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(intrinsics float64 [t 3 3], extrinsics float64 [t 3 4]) of a file.

    frames: how many cameras are needed. Raises ValueError that names the file and what is wrong.
    """
    found = read_json(path)
    if not isinstance(found, dict) or not {"intrinsics", "frames"} <= set(found):
        raise ValueError(
            f'{path}: expected {{"intrinsics": [fx, fy, cx, cy], "frames": '
            "[3 x 4 matrix, ...]}; see vdx.data.camera."
        )
    extrinsics = _array(path, "frames", found["frames"])
    if extrinsics.ndim != 3 or extrinsics.shape[1:] != (3, 4):
        raise ValueError(
            f'{path}: "frames" is {list(extrinsics.shape)}, expected one '
            "world-to-camera matrix of 3 rows and 4 columns for each frame."
        )
    if frames is not None and len(extrinsics) != frames:
        raise ValueError(f"{path} has {len(extrinsics)} cameras, and the clip has {frames} frames.")
    for i, turn in enumerate(extrinsics[..., :3]):
        if np.abs(turn @ turn.T - np.eye(3)).max() > SLACK or np.linalg.det(turn) < 0:
            raise ValueError(f"{path}: the first three columns of frame {i} are no rotation.")
    rows = _array(path, "intrinsics", found["intrinsics"])
    if rows.shape not in ((4,), (len(extrinsics), 4)):
        raise ValueError(
            f'{path}: "intrinsics" is {list(rows.shape)}, expected [fx, fy, cx, cy], '
            f"or {len(extrinsics)} of them, one for each frame."
        )
    if (rows[..., :2] <= 0).any() or (rows > 100).any():
        raise ValueError(
            f'{path}: "intrinsics" {rows.reshape(-1, 4)[0].tolist()} are not in units '
            "of the frame: divide fx and cx by its width, fy and cy by its height."
        )
    matrices = np.zeros((len(extrinsics), 3, 3))
    matrices[:, [0, 1, 0, 1], [0, 1, 2, 2]] = rows
    matrices[:, 2, 2] = 1.0
    return matrices, extrinsics


def _array(path: str | Path, name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f'{path}: "{name}" is not a list of equally long lists of numbers.'
        ) from None
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f'{path}: "{name}" is empty or not finite.')
    return array
