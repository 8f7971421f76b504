"""Procedural captioned scenes whose state is known exactly at every instant.

A scene is a few coloured shapes that move over a background. It is a function of
(seed, split, index) only, and can be drawn at any time, resolution and frame rate, so one
source serves training, the judging of prompt following and the physics metrics.

World coordinates: the frame is the unit square, x to the right and y down; time in seconds;
speeds in frame widths per second; angles in radians, clockwise on the screen. A radius is a
fraction of the shorter side of the frame, so shapes keep their aspect in any frame.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from vdx.data.scenes.drawing import BACKGROUNDS, COLOURS, SHAPES, STYLES, background, draw, still
from vdx.data.signals import ACTIONS

__all__ = [
    "BACKGROUNDS",
    "CAMERAS",
    "COLOURS",
    "MOTIONS",
    "SHAPES",
    "STEERED",
    "STYLES",
    "Object",
    "Scene",
]

# The velocity of each motion in units of the object's speed.
VELOCITIES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*VELOCITIES, "grow", "shrink", "turn", "bounce")
# Also known, but not among the motions of a source that does not ask for it: the object does one
# of ACTIONS after another, each for one of HOLDS seconds. At 4, 8 or 16 frames per second and with
# the start "first", a frame then never falls into the middle of an action.
STEERED = "steered"
HOLDS = (0.25, 0.5)
STEER = 2.5  # times the object's speed
SIZES = {"small": 0.15, "large": 0.25}  # radius
SHARED = 0.7  # of the radius where two objects share the frame
SPEEDS = {"slow": 0.12, "fast": 0.2}  # widths per second
CAMERAS = {"static": 0.0, "pan left": 0.1, "pan right": -0.1}  # how fast the world goes right
STAY = 2.0  # seconds that a moving object stays wholly inside the frame
GROWTH = 1.7  # relative growth per second, for each width per second of speed
SHRINK_FROM = 1.5  # a shrinking object starts larger, so that it is still seen at the end
RADII = (0.05, 0.5)  # growth and shrinkage end here
TURN = 12.5  # radians per second, for each width per second of speed
BOUNCE_PERIOD = {"slow": 1.2, "fast": 0.8}  # seconds from floor to floor
BOTTOM = {
    "circle": 1.0,
    "ring": 1.0,
    "square": 0.84,
    "cross": 1.0,
    "triangle": 0.56,
    "star": 1.12 * math.cos(math.pi / 5),
}  # lowest point of an upright shape, in radii


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape: words, and the numbers that fix its path in world coordinates.

    x, y: centre at time 0 (for a bounce, y is the lowest position of the centre);
    radius, angle: at time 0; rise, phase: height of a bounce and where in it time 0 falls;
    commands: when a steered object begins which of ACTIONS, ascending, "stay" last.
    """

    shape: str
    colour: str
    motion: str
    size: str
    speed: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.15
    angle: float = 0.0
    rise: float = 0.0
    phase: float = 0.0
    commands: tuple[tuple[float, str], ...] = ()

    def state(self, times: np.ndarray) -> dict[str, np.ndarray]:
        """center [t 2], size [t] (the radius), angle [t], in world coordinates, any time."""
        rate, still = SPEEDS[self.speed], np.zeros_like(times)
        vx, vy = VELOCITIES.get(self.motion, (0, 0))
        x, y = self.x + rate * vx * times, self.y + rate * vy * times
        size, angle = still + self.radius, still + self.angle
        if self.motion in ("grow", "shrink"):
            sign = 1.0 if self.motion == "grow" else -1.0
            size = np.clip(self.radius * np.exp(sign * GROWTH * rate * times), *RADII)
        elif self.motion == "turn":
            angle = self.angle + TURN * rate * times
        elif self.motion == "bounce":
            u = (self.phase + times / BOUNCE_PERIOD[self.speed]) % 1.0
            y = self.y - self.rise * 4.0 * u * (1.0 - u)
        elif self.motion == STEERED:
            since = np.array([begin for begin, _ in self.commands])
            steps = np.array([VELOCITIES.get(what, (0, 0)) for _, what in self.commands[:-1]])
            path = np.cumsum(STEER * rate * steps * np.diff(since)[:, None], axis=0)
            x, y = (
                start + np.interp(times, since, [0.0, *way])
                for start, way in zip((self.x, self.y), path.T, strict=True)
            )
        return {"center": np.stack([x, y], -1), "size": size, "angle": angle}

    def actions(self, times: np.ndarray) -> np.ndarray:
        """int32 [t], rows of ACTIONS: what is done from each instant to the next; the last one
        is repeated. Of an object that is not steered, which way it goes, or "stay"."""
        times = np.asarray(times, np.float64)
        begin, end = (times[:-1], times[1:]) if len(times) > 1 else (times, times)
        if self.motion == STEERED:  # what is done half way between the two
            since = [start for start, _ in self.commands]
            place = np.searchsorted(since, (begin + end) / 2, side="right") - 1
            rows = np.array([ACTIONS.index(what) for _, what in self.commands])[place]
        elif self.motion == "bounce":
            fall = self.state(end)["center"][:, 1] - self.state(begin)["center"][:, 1]
            rows = np.where(fall < 0, ACTIONS.index("up"), ACTIONS.index("down"))
        else:
            going = self.motion if self.motion in VELOCITIES else "stay"
            rows = np.full(len(begin), ACTIONS.index(going))
        if len(times) > 1:
            rows = np.where(end > begin, rows, ACTIONS.index("stay"))  # of a clip that is held
            rows = np.append(rows, rows[-1])
        return rows.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects (the first one is the main one, drawn on top), where they are, and the words."""

    objects: tuple[Object, ...]
    background: str = "black"
    camera: str = "static"
    style: str = "flat"
    caption: str = ""

    def state(self, times) -> list[dict[str, np.ndarray]]:
        """For each object the exact center [t 2], size [t] and angle [t] at times [t] seconds.

        Frame coordinates, the camera included: (0, 0) is the upper left corner of the frame
        and (1, 1) the lower right one; size is the radius over the frame's shorter side.
        """
        times = np.asarray(times, np.float64)
        states = [item.state(times) for item in self.objects]
        for state in states:
            state["center"][:, 0] += self.shift(times)
        return states

    def shift(self, times: np.ndarray) -> np.ndarray:
        """How far the camera has moved the world to the right, in widths, at times [t]."""
        return CAMERAS[self.camera] * np.asarray(times, np.float64)

    def render(self, times, height: int, width: int) -> np.ndarray:
        """uint8 [t h w 3] at times [t] seconds, edges antialiased over one pixel."""
        times = np.asarray(times, np.float64)
        shift = self.shift(times)
        back = (
            background(self.background, shift, height, width)
            if shift.any()
            else still(self.background, height, width)
        )
        canvas = np.empty((len(times), height, width, 3), np.float32)
        canvas[:] = back
        for item, state in reversed(list(zip(self.objects, self.state(times), strict=True))):
            draw(canvas, item.shape, item.colour, self.style, state)
        canvas += 0.5  # the cast truncates
        return canvas.astype(np.uint8)

    @property
    def attributes(self) -> dict[str, Any]:
        """The words of the main object and the scene, and of every object under "objects"."""
        words = [
            {k: getattr(o, k) for k in ("shape", "colour", "motion", "size", "speed")}
            for o in self.objects
        ]
        return {
            **words[0],
            "background": self.background,
            "camera": self.camera,
            "style": self.style,
            "objects": words,
        }
