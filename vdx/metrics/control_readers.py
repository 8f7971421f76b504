"""Readers of control metrics: (video uint8 [t h w 3], fps) -> what the clip shows."""

import itertools
import math

import numpy as np

from vdx.data.scenes.world import COMMAND_SPEED, SPEEDS, VELOCITIES
from vdx.metrics.optical_flow import lucas_kanade, pan_speed
from vdx.metrics.prompt_following import read_angles
from vdx.metrics.tracking import track_object

__all__ = [
    "background_pan",
    "frame_flows",
    "object_actions",
    "object_angles",
    "object_path",
    "object_step",
    "silhouette",
]

DARK = 92  # levels; backgrounds are darker in every channel
NEAR = 2  # pixels around a bright pixel that may show its edge
COLOURED = 0.42  # amount of its colour from which a pixel is the object's, even a dark fill
LEAST_STEP = 0.1  # pixels a frame, below which a ratio of speeds is noise
HALF_STEP = 0.5  # of the slowest action, below which an object stays


def object_path(video: np.ndarray, fps: float) -> np.ndarray:
    """Read [t 2] pixels: the object's centre, NaN in frames that do not show it."""
    path = np.full((len(video), 2), np.nan)
    track = track_object(video)
    if track is not None:
        path[track.seen] = track.centre[track.seen]
    return path


def silhouette(video: np.ndarray, fps: float) -> np.ndarray:
    """Read bool [t h w]: the pixels of the object."""
    track = track_object(video)
    if track is None:
        return np.zeros(video.shape[:3], bool)
    return track.amount > COLOURED


def object_angles(video: np.ndarray, fps: float) -> np.ndarray:
    """Read [t 2]: the angle, and the period of the shape's symmetry; NaN if not seen."""
    found = np.full((len(video), 2), np.nan)
    track = track_object(video)
    if track is not None and len(track.seen) >= len(video) / 2:
        angles, period = read_angles(track)
        found[track.seen] = np.stack([angles, np.full(len(angles), period or np.nan)], -1)
    return found


def frame_flows(video: np.ndarray, fps: float) -> np.ndarray:
    """Read [t-1 h w 2] pixels: the flow of each frame to the next."""
    return np.stack([lucas_kanade(one, two) for one, two in itertools.pairwise(video)])


def background_pan(video: np.ndarray, fps: float) -> float:
    """Read the background's speed to the right, in widths per second.

    Objects and their edges are left out.
    """
    height, width = video.shape[1:3]
    side = 2 * NEAR + 1
    bright = np.pad(video.max(-1) > DARK, ((0, 0), (NEAR, NEAR), (NEAR, NEAR)))
    shifts = [bright[:, y : y + height, x : x + width] for y in range(side) for x in range(side)]
    return pan_speed(video, fps, ~np.any(shifts, 0))


def object_actions(video: np.ndarray, fps: float) -> np.ndarray:
    """Read int [t-1], rows of ACTIONS: the object's direction, -1 if not seen."""
    height, width = video.shape[1:3]
    velocity = np.diff(object_path(video, fps) / (width, height), axis=0) * fps  # t-1, 2
    directions = np.array(list(VELOCITIES.values()), float)
    nearest = 1 + (velocity @ directions.T).argmax(-1)  # the rows of ACTIONS after "stay"
    still = np.abs(velocity).max(-1) < HALF_STEP * COMMAND_SPEED * SPEEDS["slow"]
    rows = np.where(still, 0, nearest)
    return np.where(np.isfinite(velocity).all(-1), rows, -1)


def object_step(video: np.ndarray, fps: float) -> float:
    """Read the object's pixels a frame along a straight line; NaN if it hardly moves."""
    path = object_path(video, fps)
    seen = np.flatnonzero(np.isfinite(path).all(-1))
    if len(seen) < 3:
        return math.nan
    slope = np.polyfit(seen, path[seen], 1)[:1]
    length = float(np.linalg.norm(slope))
    return length if length >= LEAST_STEP else math.nan
