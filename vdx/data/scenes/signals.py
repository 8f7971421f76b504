"""What steers a procedural scene, exact, from its state: see `vdx.data.signals` for the formats."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vdx.data.scenes.drawing import draw, paint, still
from vdx.data.scenes.world import Scene

__all__ = ["actions", "camera", "depth", "flow", "pose", "reference", "tracks"]

NEARNESS = (1.0, 0.5)  # of the main object, and of the one behind it
REFERENCE_RADIUS = 0.25
DOT, LINE = 0.25, 0.08  # radius of a skeleton's joint and half width of its bone, in radii


def _pixels(scene: Scene, times: np.ndarray, height: int, width: int) -> list[dict[str, Any]]:
    """For each object x, y [t h w], pixels from its centre; size and angle [t 1 1]; cover."""
    found = []
    for item, state in zip(scene.objects, scene.state(times), strict=True):
        x, y = (state["center"] * (width, height)).T[..., None, None]
        size, angle = (state[k][:, None, None] for k in ("size", "angle"))
        one = {
            "x": (np.arange(width) + 0.5 - x).astype(np.float32),
            "y": (np.arange(height)[:, None] + 0.5 - y).astype(np.float32),
            "size": size * min(height, width),
            "angle": angle,
            "state": state,
        }
        found.append(
            {**one, "cover": paint(item.shape, "flat", one["x"], one["y"], one["size"], angle)[0]}
        )
    return found


def depth(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 [t h w 1]: 1 in the main object, 0.5 in the one behind it, 0 outside."""
    near = np.zeros((len(times), height, width), np.float32)
    for item, value in reversed(
        list(zip(_pixels(scene, times, height, width), NEARNESS, strict=False))
    ):
        near += item["cover"] * (value - near)
    return near[..., None]


def pose(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 [t h w 3]: the main object's joint, its bone, and both of a second object.

    The joint is a dot at the centre; the bone leads from there as far as the radius, the way
    that is up for the upright shape.
    """
    picture = np.zeros((len(times), height, width, 3), np.float32)
    for i, item in enumerate(_pixels(scene, times, height, width)):
        x, y, size = item["x"], item["y"], item["size"]
        up = np.sin(item["angle"]), -np.cos(item["angle"])
        along = np.clip(x * up[0] + y * up[1], 0.0, size)
        bone = np.hypot(x - along * up[0], y - along * up[1]) - np.maximum(LINE * size, 0.5)
        dot = np.hypot(x, y) - np.maximum(DOT * size, 1.0)
        dot, bone = (np.clip(0.5 - edge, 0.0, 1.0) for edge in (dot, bone))
        if i == 0:
            picture[..., 0], picture[..., 1] = dot, bone
        else:
            picture[..., 2] = np.maximum(dot, bone)
    return picture


def flow(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 [t h w 2]: how far each pixel goes until the next instant, 0 at the last one.

    A pixel of an object moves, grows and turns with it, one of the background with the camera.
    """
    result = np.zeros((len(times), height, width, 2), np.float32)
    result[:-1, ..., 0] = np.diff(scene.shift(times))[:, None, None] * width
    for item in reversed(_pixels(scene, times, height, width)):
        move = np.diff(item["state"]["center"], axis=0) * (width, height)
        grow = item["size"][1:] / item["size"][:-1]
        turn = np.diff(item["angle"], axis=0)
        cos, sin = grow * np.cos(turn), grow * np.sin(turn)
        x, y = np.broadcast_arrays(item["x"][:-1], item["y"][:-1])
        to = np.stack([cos * x - sin * y - x, sin * x + cos * y - y], -1) + move[:, None, None]
        inside = item["cover"][:-1] >= 0.5
        result[:-1][inside] = to[inside]
    return result


def camera(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """float64 [t 3 7]: a pan moves the camera sideways before a plane at depth 1, with the focal
    length of one frame width, so that the plane shifts by as much the other way."""
    found = np.zeros((len(times), 3, 7))
    found[:] = np.eye(3, 7) + np.eye(3, 7, 3)
    found[:, 1, 1] = width / height
    found[:, :2, 2] = 0.5
    found[:, 0, 6] = scene.shift(times)
    return found


def actions(scene: Scene, times: np.ndarray) -> np.ndarray:
    """int32 [t]: what the main object does, one of ACTIONS."""
    return scene.objects[0].actions(times)


def reference(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [1 h w 3]: the main object alone, upright and large, before plain black."""
    item = scene.objects[0]
    canvas = still("black", height, width).copy()
    draw(
        canvas,
        item.shape,
        item.colour,
        scene.style,
        {
            "center": np.full((1, 2), 0.5),
            "size": np.full(1, REFERENCE_RADIUS),
            "angle": np.zeros(1),
        },
    )
    return (canvas + 0.5).astype(np.uint8)


def tracks(scene: Scene, height: int, width: int) -> Mapping[str, Callable]:
    """{name: read(times)} for a Record whose frames are of that size."""
    sized = {"depth": depth, "pose": pose, "flow": flow, "camera": camera, "reference": reference}
    return {"actions": functools.partial(actions, scene)} | {
        name: functools.partial(read, scene, height=height, width=width)
        for name, read in sized.items()
    }
