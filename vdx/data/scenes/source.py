"""Procedural captioned scenes whose state is known exactly at every instant.

A scene is a few coloured shapes that move over a background. It is a function of
(seed, split, index) only, and can be drawn at any time, resolution and frame rate, so one
source serves training, the judging of prompt following and the physics metrics.

World coordinates: the frame is the unit square, x to the right and y down; time in seconds;
speeds in frame widths per second; angles in radians, clockwise on the screen. A radius is a
fraction of the shorter side of the frame, so shapes keep their aspect in any frame.
"""

import dataclasses
import functools
import itertools
import math
import zlib
from typing import Any

import numpy as np

from vdx.config.build import ConfigError, nearest
from vdx.data.record import Record
from vdx.data.scenes.captions import describe
from vdx.data.scenes.drawing import (
    BACKGROUNDS,
    COLOURS,
    REACH,
    SHAPES,
    STYLES,
    background,
    draw,
    still,
)
from vdx.data.scenes.signals import tracks
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
    "Scenes",
    "describe",
    "is_validation",
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
VALIDATION_ONE_IN = 5


def is_validation(colour: str, shape: str, motion: str) -> bool:
    """Whether the combination belongs to the "validation" split: about one in five does."""
    return zlib.crc32(f"{colour} {shape} {motion}".encode()) % VALIDATION_ONE_IN == 0


@functools.lru_cache
def _triples(shapes, colours, motions, split: str) -> tuple[tuple[str, str, str], ...]:
    """The (colour, shape, motion) combinations of a split; what is round cannot visibly turn."""
    wanted = {"train": (False,), "validation": (True,), "all": (False, True)}[split]
    return tuple(
        (c, s, m)
        for c, s, m in itertools.product(colours, shapes, motions)
        if not (m == "turn" and s in ("circle", "ring")) and is_validation(c, s, m) in wanted
    )


@functools.lru_cache
def _settings(backgrounds, cameras) -> tuple[tuple[str, str], ...]:
    """The (background, camera) pairs; over a plain background a pan could not be seen."""
    return tuple(
        (b, c)
        for b, c in itertools.product(backgrounds, cameras)
        if c == "static" or BACKGROUNDS[b][2]
    )


# Scenes -------------------------------------------------------------------------------------


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


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    """Uniform in [low, high], the middle where that is empty."""
    return low + (high - low) * float(rng.random()) if low < high else (low + high) / 2


def _steer(
    x: float,
    y: float,
    rate: float,
    camera: str,
    margin: float,
    duration: float,
    rng: np.random.Generator,
) -> tuple[tuple[float, str], ...]:
    """Commands for `duration` seconds that keep a centre as far as `margin` from the border."""
    commands: list[tuple[float, str]] = []
    now, place = 0.0, (x, y)
    while now < duration:
        hold = HOLDS[int(rng.random() * len(HOLDS))]
        outside = {}
        for action in ACTIONS:
            vx, vy = VELOCITIES.get(action, (0, 0))
            to = (
                place[0] + (STEER * rate * vx + CAMERAS[camera]) * hold,
                place[1] + STEER * rate * vy * hold,
            )
            outside[action] = max(0.0, *(max(margin - v, v + margin - 1.0) for v in to)), to
        least = min(far for far, _ in outside.values()) + 1e-9
        fit = [
            action
            for action, (far, _) in outside.items()
            if far <= least and [action] != [what for _, what in commands[-1:]]
        ]
        fit = fit or [action for action, (far, _) in outside.items() if far <= least]
        commands.append((now, fit[int(rng.random() * len(fit))]))
        now, place = now + hold, outside[commands[-1][1]][1]
    return (*commands, (now, "stay"))


def _place(
    words: tuple[str, str, str],
    camera: str,
    sizes: tuple[str, ...],
    scale: float,
    duration: float,
    rng: np.random.Generator,
) -> Object:
    """An object of that colour, shape and motion, wholly in the frame for STAY seconds."""
    colour, shape, motion = words
    size = sizes[int(rng.random() * len(sizes))]
    # Speeds add up under a moving camera: a fast object would leave the frame.
    speed = "fast" if rng.random() < 0.5 and camera == "static" else "slow"
    radius, rate = SIZES[size] * scale * (SHRINK_FROM if motion == "shrink" else 1.0), SPEEDS[speed]
    largest = radius * (math.exp(GROWTH * rate * STAY) if motion == "grow" else 1.0)
    margin = REACH * largest
    vx, vy = VELOCITIES.get(motion, (0, 0))
    # A steered object comes back by itself.
    dx, dy = (
        ((rate * vx + CAMERAS[camera]) * STAY, rate * vy * STAY)
        if motion != STEERED
        else (0.0, 0.0)
    )
    x = _between(rng, margin - min(dx, 0.0), 1.0 - margin - max(dx, 0.0))
    y = _between(rng, margin - min(dy, 0.0), 1.0 - margin - max(dy, 0.0))
    angle = rise = phase = 0.0
    if motion == "turn":
        angle = _between(rng, 0.0, math.tau)
    elif motion == "bounce":  # it starts between the top and half way down, so it lands soon
        y = 1.0 - radius * BOTTOM[shape]
        rise, phase = _between(rng, 0.32, 0.48), _between(rng, 0.5, 0.8)
    commands = _steer(x, y, rate, camera, margin, duration, rng) if motion == STEERED else ()
    return Object(shape, colour, motion, size, speed, x, y, radius, angle, rise, phase, commands)


def _gap(objects: list[Object]) -> float:
    """Distance at time 0 between the first and the last object; 1 where circles touch."""
    one, two = objects[0], objects[-1]
    y1, y2 = (o.y - o.rise * 4 * o.phase * (1 - o.phase) for o in (one, two))
    return math.hypot(one.x - two.x, y1 - y2) / (one.radius + two.radius)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A source of `size` procedural clips; clip i depends on (seed, split, i) and the vocabulary.

    split: "train" never shows a held-out (colour, shape, motion), "validation" shows only those,
    "all" shows both. shapes ... sizes restrict the vocabulary. duration: seconds of a clip.
    Raises ConfigError for an unknown word and for a selection that is empty.
    """

    height: int = 32
    width: int = 32
    seed: int = 0
    size: int = 1_000_000
    split: str = "train"
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    motions: tuple[str, ...] = MOTIONS
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    cameras: tuple[str, ...] = tuple(CAMERAS)
    styles: tuple[str, ...] = STYLES
    sizes: tuple[str, ...] = tuple(SIZES)
    max_objects: int = 2
    duration: float = STAY

    def __post_init__(self):
        known = {
            "shapes": SHAPES,
            "colours": COLOURS,
            "motions": (*MOTIONS, STEERED),
            "styles": STYLES,
            "backgrounds": BACKGROUNDS,
            "cameras": CAMERAS,
            "sizes": SIZES,
        }
        for field, words in known.items():
            chosen = getattr(self, field)
            for word in chosen:
                if word not in words:
                    raise ConfigError(
                        f"Scenes.{field}: unknown word {word!r}."
                        f"{nearest(word, words)} Known: {', '.join(words)}."
                    )
            if not chosen:
                raise ConfigError(f"Scenes.{field} is empty. Known: {', '.join(words)}.")
        if self.split not in ("train", "validation", "all"):
            raise ConfigError(f"Scenes.split is {self.split!r}. Known: train, validation, all.")
        if self.max_objects not in (1, 2):
            raise ConfigError(f"Scenes.max_objects is {self.max_objects}, expected 1 or 2.")
        if min(self.height, self.width, self.size) < 1 or self.seed < 0 or self.duration <= 0:
            raise ConfigError(
                "Scenes.height, width, size and duration must be positive, seed "
                f"not negative: {self}."
            )
        triples = _triples(self.shapes, self.colours, self.motions, self.split)
        if not triples:
            raise ConfigError(
                f"Scenes: no {self.split!r} combination of {self.colours}, "
                f"{self.shapes} and {self.motions}. Choose more words, split "
                "'all', or for 'turn' a shape that is not round."
            )
        if self.max_objects > len({colour for colour, _, _ in triples}):
            raise ConfigError(
                "Scenes.max_objects is 2: two objects need two colours, and the "
                f"{self.split!r} combinations have only {triples[0][0]!r}."
            )
        if not _settings(self.backgrounds, self.cameras):
            raise ConfigError(
                f"Scenes: a pan needs a patterned background, and {self.backgrounds}"
                " are plain. Add stripes, dots or checks, or camera 'static'."
            )

    def scene(self, index: int) -> Scene:
        """Scene `index`, the same in every process. Raises IndexError outside [0, size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"Scenes has clips 0 to {self.size - 1}, not {index}.")
        split = ("train", "validation", "all").index(self.split)
        # Counter-based, so that any clip is drawn without the ones before it.
        rng = np.random.Generator(np.random.Philox(key=((4 * self.seed + split) << 64) + index))
        settings = _settings(self.backgrounds, self.cameras)
        place, camera = settings[int(rng.random() * len(settings))]
        style = self.styles[int(rng.random() * len(self.styles))]
        triples = _triples(self.shapes, self.colours, self.motions, self.split)
        words = [triples[int(rng.random() * len(triples))]]
        if self.max_objects > 1 and rng.random() < 0.5:
            others = [t for t in triples if t[0] != words[0][0]]
            words.append(others[int(rng.random() * len(others))])
        # Of a few arrangements of two objects the one with the most room between them.
        scale = SHARED if words[1:] else 1.0
        tries = [
            [_place(w, camera, self.sizes, scale, self.duration, rng) for w in words]
            for _ in range(8 if words[1:] else 1)
        ]
        objects = max(tries, key=_gap)
        bare = Scene(tuple(objects), place, camera, style)
        return dataclasses.replace(bare, caption=describe(bare, rng))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        read = functools.partial(scene.render, height=self.height, width=self.width)
        return Record(
            f"scenes/{self.split}/{self.seed}/{index}",
            scene.caption,
            self.duration,
            None,
            read,
            scene.attributes,
            tracks(scene, self.height, self.width),
        )
