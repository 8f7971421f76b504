"""Control signals of a procedural scene, exact, from its state.

`vdx.data.signals` lists the formats.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vdx.data.record import Reader
from vdx.data.scenes.drawing import draw, paint, still
from vdx.data.scenes.world import Scene

__all__ = ["actions", "camera", "depth", "flow", "pose", "reference", "tracks"]

NEARNESS = (1.0, 0.5)  # of the main object, and of the one behind it
REFERENCE_RADIUS = 0.25  # of the subject in its image; the radius of a large object
JOINT = 0.25  # radius of a skeleton's joint, in radii of the object
BONE = 0.08  # half width of a skeleton's bone, in radii of the object


class _ObjectPixels(NamedTuple):
    """One object of a scene at some instants, in pixels of a frame."""

    x: np.ndarray  # float32 [t 1 w], pixels to the right of its centre
    y: np.ndarray  # float32 [t h 1], pixels below its centre
    centre: np.ndarray  # [t 2], in coordinates of the frame
    size: np.ndarray  # [t 1 1], the radius in pixels
    angle: np.ndarray  # [t 1 1], radians
    cover: np.ndarray  # [t h w], its coverage in [0, 1]


def _object_pixels(scene: Scene, times: np.ndarray, height: int, width: int) -> list[_ObjectPixels]:
    """Return every object of a scene at some instants, the main one first."""
    found = []
    for item, state in zip(scene.objects, scene.state(times), strict=True):
        centre = state["center"]
        centre_x = centre[:, 0, None, None] * width
        centre_y = centre[:, 1, None, None] * height
        x = (np.arange(width) + 0.5 - centre_x).astype(np.float32)
        y = (np.arange(height)[:, None] + 0.5 - centre_y).astype(np.float32)
        size = state["size"][:, None, None] * min(height, width)
        angle = state["angle"][:, None, None]
        cover, _ = paint(item.shape, "flat", x, y, size, angle)
        found.append(_ObjectPixels(x, y, centre, size, angle, cover))
    return found


def depth(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return nearness, float32 [t h w 1].

    It is 1 in the main object, 0.5 in the one behind it, and 0 outside.
    """
    near = np.zeros((len(times), height, width), np.float32)
    objects = _object_pixels(scene, times, height, width)
    back_to_front = reversed(list(zip(objects, NEARNESS, strict=False)))
    for item, value in back_to_front:
        near += item.cover * (value - near)
    return near[..., None]


def pose(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return images of skeletons, float32 [t h w 3].

    The channels are the main object's joint, its bone, and both of a second object.
    The joint is a dot at the centre. The bone leads from there to the radius, in the direction
    that is up for the upright shape.
    """
    image = np.zeros((len(times), height, width, 3), np.float32)

    for i, item in enumerate(_object_pixels(scene, times, height, width)):
        up_x = np.sin(item.angle)
        up_y = -np.cos(item.angle)

        # Signed distances in pixels: to the bone, from the nearest point on its axis, and the dot.
        along = np.clip(item.x * up_x + item.y * up_y, 0.0, item.size)
        bone = np.hypot(item.x - along * up_x, item.y - along * up_y)
        bone = bone - np.maximum(BONE * item.size, 0.5)
        joint = np.hypot(item.x, item.y) - np.maximum(JOINT * item.size, 1.0)

        # Coverage, antialiased over one pixel.
        joint = np.clip(0.5 - joint, 0.0, 1.0)
        bone = np.clip(0.5 - bone, 0.0, 1.0)
        if i == 0:
            image[..., 0] = joint
            image[..., 1] = bone
        else:
            image[..., 2] = np.maximum(joint, bone)
    return image


def flow(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the displacement of each pixel until the next instant, float32 [t h w 2].

    A pixel of an object moves, grows and turns with it, one of the background moves with the
    camera. The last instant has the displacement 0.
    """
    result = np.zeros((len(times), height, width, 2), np.float32)
    result[:-1, ..., 0] = np.diff(scene.shift(times))[:, None, None] * width
    for item in reversed(_object_pixels(scene, times, height, width)):
        # From each instant to the next.
        move = np.diff(item.centre, axis=0) * (width, height)
        growth = item.size[1:] / item.size[:-1]
        turn = np.diff(item.angle, axis=0)

        # A pixel's offset from the centre is turned and scaled, then the centre moves.
        cos = growth * np.cos(turn)
        sin = growth * np.sin(turn)
        x, y = np.broadcast_arrays(item.x[:-1], item.y[:-1])
        step = np.stack([cos * x - sin * y - x, sin * x + cos * y - y], -1) + move[:, None, None]

        inside = item.cover[:-1] >= 0.5
        result[:-1][inside] = step[inside]
    return result


def camera(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return float64 [t 3 7]: intrinsics [3 3], then extrinsics [3 4].

    A pan moves the camera sideways before a plane at depth 1. The focal length is one frame
    width, so the plane shifts by as much the other way.
    """
    cameras = np.zeros((len(times), 3, 7))
    cameras[:] = np.eye(3, 7) + np.eye(3, 7, 3)
    cameras[:, 1, 1] = width / height  # fy, in heights
    cameras[:, :2, 2] = 0.5  # cx, cy
    cameras[:, 0, 6] = scene.shift(times)
    return cameras


def actions(scene: Scene, times: np.ndarray) -> np.ndarray:
    """Return int32 [t], the action of the main object: indices into ACTIONS."""
    return scene.objects[0].actions(times)


def reference(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the main object alone, upright and large, on black: uint8 [1 h w 3]."""
    item = scene.objects[0]
    canvas = still("black", height, width).copy()
    state = {
        "center": np.full((1, 2), 0.5),
        "size": np.full(1, REFERENCE_RADIUS),
        "angle": np.zeros(1),
    }
    draw(canvas, item.shape, item.colour, scene.style, state)
    return (canvas + 0.5).astype(np.uint8)


def tracks(scene: Scene, height: int, width: int) -> Mapping[str, Reader]:
    """Return {name: read(times)} for a Record whose frames are of that size."""
    sized = {"depth": depth, "pose": pose, "flow": flow, "camera": camera, "reference": reference}
    readers: dict[str, Reader] = {"actions": functools.partial(actions, scene)}
    for name, read in sized.items():
        readers[name] = functools.partial(read, scene, height=height, width=width)
    return readers
