"""How a scene is sampled: words, and the numbers that keep every object in the frame."""

import functools
import itertools
import math
import zlib

import numpy as np

from vdx.data.scenes.drawing import REACH
from vdx.data.scenes.world import (
    BACKGROUNDS,
    BOTTOM,
    CAMERAS,
    GROWTH,
    HOLDS,
    SHRINK_FROM,
    SIZES,
    SPEEDS,
    STAY,
    STEER,
    STEERED,
    VELOCITIES,
    Object,
)
from vdx.data.signals import ACTIONS

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
