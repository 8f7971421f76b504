"""Sampling of scenes: words, and numbers that keep all objects in the frame."""

import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from vdx.data.scenes.drawing import EXTENT
from vdx.data.scenes.world import (
    BACKGROUNDS,
    BOTTOM,
    CAMERAS,
    COMMAND_SPEED,
    COMMANDED,
    GROWTH,
    HOLDS,
    SHARED,
    SHRINK_FROM,
    SIZES,
    SPEEDS,
    STAY,
    VELOCITIES,
    Object,
    Scene,
)
from vdx.data.signals import ACTIONS

__all__ = [
    "SPLITS",
    "Combination",
    "Surroundings",
    "Vocabulary",
    "combinations",
    "is_validation",
    "pick",
    "sample_scene",
    "surroundings",
]

T = TypeVar("T")

SPLITS = ("train", "validation", "all")
VALIDATION_ONE_IN = 5  # combinations
ROUND = ("circle", "ring")  # shapes that cannot visibly turn
ARRANGEMENTS = 8  # drawn of two objects, of which the one with the most room is taken


class Combination(NamedTuple):
    """The words of an object that decide its split."""

    colour: str
    shape: str
    motion: str


class Surroundings(NamedTuple):
    """The words of a scene besides its objects and its style."""

    background: str
    camera: str


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words and numbers among which a scene is sampled."""

    combinations: tuple[Combination, ...]
    surroundings: tuple[Surroundings, ...]
    styles: tuple[str, ...]
    sizes: tuple[str, ...]
    max_objects: int  # 1 or 2
    duration: float  # seconds for which a commanded object has commands


def pick(options: Sequence[T], rng: np.random.Generator) -> T:
    """Return one of the options, drawn uniformly."""
    # Four times cheaper than rng.integers, and a caption needs a dozen picks.
    return options[int(rng.random() * len(options))]


def is_validation(colour: str, shape: str, motion: str) -> bool:
    """Return true if a combination is in "validation", as about one in five is."""
    return zlib.crc32(f"{colour} {shape} {motion}".encode()) % VALIDATION_ONE_IN == 0


@functools.lru_cache
def combinations(
    shapes: tuple[str, ...], colours: tuple[str, ...], motions: tuple[str, ...], split: str
) -> tuple[Combination, ...]:
    """Return the combinations of a split, without the round shapes that turn."""
    sides = {"train": (False,), "validation": (True,), "all": (False, True)}[split]
    return tuple(
        Combination(colour, shape, motion)
        for colour, shape, motion in itertools.product(colours, shapes, motions)
        if not (motion == "turn" and shape in ROUND)
        and is_validation(colour, shape, motion) in sides
    )


@functools.lru_cache
def surroundings(
    backgrounds: tuple[str, ...], cameras: tuple[str, ...]
) -> tuple[Surroundings, ...]:
    """Return the pairs of background and camera, without pans over a plain background."""
    return tuple(
        Surroundings(background, camera)
        for background, camera in itertools.product(backgrounds, cameras)
        if camera == "static" or BACKGROUNDS[background][2]
    )


def sample_scene(vocabulary: Vocabulary, rng: np.random.Generator) -> Scene:
    """Draw a scene without a caption: one object, or with equal chance two if allowed."""
    background, camera = pick(vocabulary.surroundings, rng)
    style = pick(vocabulary.styles, rng)

    # The words of the objects; two objects have two colours, so that captions distinguish them.
    words = [pick(vocabulary.combinations, rng)]
    if vocabulary.max_objects > 1 and rng.random() < 0.5:
        others = [other for other in vocabulary.combinations if other.colour != words[0].colour]
        words.append(pick(others, rng))

    # Two objects are smaller, and placed as far apart as a few tries allow.
    scale = 1.0
    tries = 1
    if len(words) == 2:
        scale = SHARED
        tries = ARRANGEMENTS

    arrangements = [
        [_place(combination, camera, scale, vocabulary, rng) for combination in words]
        for _ in range(tries)
    ]
    objects = max(arrangements, key=_gap)
    return Scene(tuple(objects), background, camera, style)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw uniformly in [low, high]; returns the middle of an empty interval."""
    if low < high:
        return low + (high - low) * float(rng.random())
    return (low + high) / 2


def _place(
    words: Combination,
    camera: str,
    scale: float,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
) -> Object:
    """Draw an object of a combination, wholly in the frame for STAY seconds.

    scale: multiplies its radius.
    """
    size = pick(vocabulary.sizes, rng)
    # Speeds add up under a moving camera: a fast object would leave the frame.
    speed = "fast" if rng.random() < 0.5 and camera == "static" else "slow"
    rate = SPEEDS[speed]

    # The room that the object needs at its largest.
    radius = SIZES[size] * scale
    if words.motion == "shrink":
        radius *= SHRINK_FROM
    largest = radius
    if words.motion == "grow":
        largest = radius * math.exp(GROWTH * rate * STAY)
    margin = EXTENT * largest

    # Where it may start so that its path stays inside; a commanded object comes back by itself.
    dx = dy = 0.0
    if words.motion != COMMANDED:
        vx, vy = VELOCITIES.get(words.motion, (0, 0))
        dx = (rate * vx + CAMERAS[camera]) * STAY
        dy = rate * vy * STAY
    x = _between(rng, margin - min(dx, 0.0), 1.0 - margin - max(dx, 0.0))
    y = _between(rng, margin - min(dy, 0.0), 1.0 - margin - max(dy, 0.0))

    item = Object(words.shape, words.colour, words.motion, size, speed, x, y, radius)
    if words.motion == "turn":
        return dataclasses.replace(item, angle=_between(rng, 0.0, math.tau))
    if words.motion == "bounce":
        # It starts between the top and half way down, so it lands soon.
        y = 1.0 - radius * BOTTOM[words.shape]
        rise = _between(rng, 0.32, 0.48)
        phase = _between(rng, 0.5, 0.8)
        return dataclasses.replace(item, y=y, rise=rise, phase=phase)
    if words.motion == COMMANDED:
        commands = _draw_commands(x, y, rate, camera, margin, vocabulary.duration, rng)
        return dataclasses.replace(item, commands=commands)
    return item


def _draw_commands(
    x: float,
    y: float,
    rate: float,
    camera: str,
    margin: float,
    duration: float,
    rng: np.random.Generator,
) -> tuple[tuple[float, str], ...]:
    """Draw the commands of a commanded object for `duration` seconds.

    They keep its centre at least `margin` from the border, or as near to that as any action can.
    An action follows itself only if no other one is as good.
    """
    commands: list[tuple[float, str]] = []
    last = ""
    now = 0.0
    while now < duration:
        hold = pick(HOLDS, rng)

        # Where each action leads, and by how much that is outside.
        ends = {}
        outside = {}
        for action in ACTIONS:
            vx, vy = VELOCITIES.get(action, (0, 0))
            end_x = x + (COMMAND_SPEED * rate * vx + CAMERAS[camera]) * hold
            end_y = y + COMMAND_SPEED * rate * vy * hold
            ends[action] = (end_x, end_y)
            outside[action] = max(0.0, _excess(end_x, margin), _excess(end_y, margin))

        # Draw one of the actions that stay inside, or leave least.
        least = min(outside.values()) + 1e-9
        best = [action for action in ACTIONS if outside[action] <= least]
        fresh = [action for action in best if action != last]
        last = pick(fresh or best, rng)

        commands.append((now, last))
        now += hold
        x, y = ends[last]
    return (*commands, (now, "stay"))


def _excess(value: float, margin: float) -> float:
    """Return by how much a coordinate is nearer than `margin` to a border of [0, 1]."""
    return max(margin - value, value + margin - 1.0)


def _gap(objects: list[Object]) -> float:
    """Return the distance of the first and last object at time 0.

    1 is where circles touch.
    """
    first = objects[0]
    last = objects[-1]
    distance = math.hypot(first.x - last.x, _height(first) - _height(last))
    return distance / (first.radius + last.radius)


def _height(item: Object) -> float:
    """Return y of an object's centre at time 0."""
    return item.y - item.rise * 4 * item.phase * (1 - item.phase)
