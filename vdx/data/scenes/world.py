"""The world of procedural scenes, whose state is known exactly at every instant.

A scene is a few coloured shapes that move over a background. It can be drawn at any time,
resolution and frame rate, so one world serves training, the metrics of prompt following and the
physics metrics.

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
    "BOTTOM",
    "BOUNCE_PERIOD",
    "CAMERAS",
    "COLOURS",
    "COMMANDED",
    "COMMAND_SPEED",
    "GROWTH",
    "HOLDS",
    "MOTIONS",
    "RADII",
    "SHAPES",
    "SHARED",
    "SHRINK_FROM",
    "SIZES",
    "SPEEDS",
    "STAY",
    "STYLES",
    "TURN",
    "VELOCITIES",
    "Object",
    "Scene",
    "State",
]

# The velocity of each motion in units of the object's speed.
VELOCITIES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*VELOCITIES, "grow", "shrink", "turn", "bounce")
# A further motion, which a source has only if its config names it: the object performs one of
# ACTIONS after another, each for one of HOLDS seconds. At 4, 8 or 16 frames per second and with
# the start "first", a frame then never falls into the middle of an action.
COMMANDED = "steered"
HOLDS = (0.25, 0.5)
# Times the object's speed: an action of 0.25 s then moves a slow object by 2.4 of 32 pixels.
COMMAND_SPEED = 2.5

SIZES = {"small": 0.15, "large": 0.25}  # radius
SHARED = 0.7  # of the radius where two objects share the frame
SPEEDS = {"slow": 0.12, "fast": 0.2}  # widths per second
CAMERAS = {"static": 0.0, "pan left": 0.1, "pan right": -0.1}  # widths per second, world to right
STAY = 2.0  # seconds that a moving object stays wholly inside the frame

GROWTH = 1.7  # relative growth per second, for each width per second of speed
SHRINK_FROM = 1.5  # a shrinking object starts larger, so that it is still visible at the end
RADII = (0.05, 0.5)  # growth and shrinkage end here
TURN = 12.5  # radians per second, for each width per second of speed
BOUNCE_PERIOD = {"slow": 1.2, "fast": 0.8}  # seconds from floor to floor
BOTTOM = {  # lowest point of an upright shape, in radii
    "circle": 1.0,
    "ring": 1.0,
    "square": 0.84,
    "cross": 1.0,
    "triangle": 0.56,
    "star": 1.12 * math.cos(math.pi / 5),
}

# "center" [t 2], "size" [t] (the radius) and "angle" [t] of an object.
State = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape: words, and the numbers that fix its path in world coordinates."""

    shape: str  # one of SHAPES
    colour: str  # one of COLOURS
    motion: str  # one of MOTIONS, or COMMANDED
    size: str  # one of SIZES; a word of the caption, `radius` is the number
    speed: str  # one of SPEEDS
    x: float = 0.5  # centre at time 0
    y: float = 0.5  # centre at time 0; for a bounce, the lowest position of the centre
    radius: float = 0.15  # at time 0
    angle: float = 0.0  # at time 0
    rise: float = 0.0  # height of a bounce
    phase: float = 0.0  # where in a bounce time 0 falls, in [0, 1)
    # When a commanded object begins which of ACTIONS, ascending, "stay" last.
    commands: tuple[tuple[float, str], ...] = ()

    def state(self, times: np.ndarray) -> State:
        """Return the state at times [t] in world coordinates; any time is valid."""
        # The straight motions, and the state of an object at rest.
        rate = SPEEDS[self.speed]
        zeros = np.zeros_like(times)
        vx, vy = VELOCITIES.get(self.motion, (0, 0))
        x = self.x + rate * vx * times
        y = self.y + rate * vy * times
        size = zeros + self.radius
        angle = zeros + self.angle

        # The others change one number in their own way.
        if self.motion in ("grow", "shrink"):
            sign = 1.0 if self.motion == "grow" else -1.0
            size = np.clip(self.radius * np.exp(sign * GROWTH * rate * times), *RADII)
        elif self.motion == "turn":
            angle = self.angle + TURN * rate * times
        elif self.motion == "bounce":
            u = (self.phase + times / BOUNCE_PERIOD[self.speed]) % 1.0
            y = self.y - self.rise * 4.0 * u * (1.0 - u)
        elif self.motion == COMMANDED:
            x, y = self._commanded_path(times)

        return {"center": np.stack([x, y], -1), "size": size, "angle": angle}

    def _commanded_path(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return x [t] and y [t] of a commanded object: a line for each command."""
        begins = np.array([begin for begin, _ in self.commands])
        velocities = [VELOCITIES.get(action, (0, 0)) for _, action in self.commands[:-1]]
        steps = COMMAND_SPEED * SPEEDS[self.speed] * np.array(velocities) * np.diff(begins)[:, None]
        path = np.cumsum(steps, axis=0)  # [commands - 1, 2]
        x = self.x + np.interp(times, begins, [0.0, *path[:, 0]])
        y = self.y + np.interp(times, begins, [0.0, *path[:, 1]])
        return x, y

    def actions(self, times: np.ndarray) -> np.ndarray:
        """Return int32 [t], the index into ACTIONS from each instant to the next.

        The last one is repeated. An object that is not commanded has its direction, or "stay".
        """
        times = np.asarray(times, np.float64)
        if len(times) <= 1:
            return self._actions_between(times, times).astype(np.int32)

        begin = times[:-1]
        end = times[1:]
        rows = self._actions_between(begin, end)
        rows = np.where(end > begin, rows, ACTIONS.index("stay"))  # a clip that holds a frame
        return np.append(rows, rows[-1]).astype(np.int32)

    def _actions_between(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Return the index into ACTIONS in each interval from `begin` [n] to `end` [n]."""
        if self.motion == COMMANDED:
            # The action half way between the two instants.
            begins = [start for start, _ in self.commands]
            command = np.searchsorted(begins, (begin + end) / 2, side="right") - 1
            return np.array([ACTIONS.index(action) for _, action in self.commands])[command]
        if self.motion == "bounce":
            fall = self.state(end)["center"][:, 1] - self.state(begin)["center"][:, 1]
            return np.where(fall < 0, ACTIONS.index("up"), ACTIONS.index("down"))
        direction = self.motion if self.motion in VELOCITIES else "stay"
        return np.full(len(begin), ACTIONS.index(direction))


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects, their surroundings, and the caption."""

    objects: tuple[Object, ...]  # the first one is the main one, drawn on top
    background: str = "black"  # one of BACKGROUNDS
    camera: str = "static"  # one of CAMERAS
    style: str = "flat"  # one of STYLES
    caption: str = ""  # "" before one is written

    def state(self, times: np.ndarray) -> list[State]:
        """Return the exact state of each object at times [t] seconds, the camera included.

        Frame coordinates: (0, 0) is the upper left corner of the frame and (1, 1) the lower right
        one; size is the radius over the frame's shorter side.
        """
        times = np.asarray(times, np.float64)
        states = [item.state(times) for item in self.objects]
        for state in states:
            state["center"][:, 0] += self.shift(times)
        return states

    def shift(self, times: np.ndarray) -> np.ndarray:
        """Return how far the camera has moved the world to the right, in widths [t]."""
        return CAMERAS[self.camera] * np.asarray(times, np.float64)

    def render(self, times: np.ndarray, height: int, width: int) -> np.ndarray:
        """Return uint8 [t h w 3] at times [t] seconds, edges antialiased over one pixel."""
        times = np.asarray(times, np.float64)
        shift = self.shift(times)
        canvas = np.empty((len(times), height, width, 3), np.float32)
        if shift.any():
            canvas[:] = background(self.background, shift, height, width)
        else:
            canvas[:] = still(self.background, height, width)

        # The main object is drawn last, on top.
        back_to_front = reversed(list(zip(self.objects, self.state(times), strict=True)))
        for item, state in back_to_front:
            draw(canvas, item.shape, item.colour, self.style, state)
        canvas += 0.5  # the cast truncates
        return canvas.astype(np.uint8)

    @property
    def attributes(self) -> dict[str, Any]:
        """The words of the main object and the scene, and of every object under "objects"."""
        names = ("shape", "colour", "motion", "size", "speed")
        words = [{name: getattr(item, name) for name in names} for item in self.objects]
        return {
            **words[0],
            "background": self.background,
            "camera": self.camera,
            "style": self.style,
            "objects": words,
        }
