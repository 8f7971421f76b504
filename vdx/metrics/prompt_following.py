"""Colour, shape and motion of clips of scenes, compared with their prompts.

The reader uses the shapes of `vdx.data.scenes`, and does not get the prompt. It follows one object
under a static camera (`vdx.metrics.tracking`), compares it with drawn templates, and fits its
motion. A word that cannot be read with confidence is "none", which is never right.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vdx.data.scenes.drawing import COLOURS, SHAPES, STYLES
from vdx.data.scenes.world import GROWTH, MOTIONS, SPEEDS, TURN
from vdx.metrics.tracking import NONE, Track, track_object

__all__ = ["ATTRIBUTES", "read_angles", "read_attributes", "score"]

ATTRIBUTES = ("colour", "shape", "motion")
SYMMETRY = {"square": 4, "triangle": 3, "star": 5, "cross": 4}  # equal looks in a full turn
LIKENESS = 0.85  # cosine with its template below which a shape is not believed
SHAPE_FRAMES = 5  # frames that vote on the shape
FINALISTS = 7  # looks (shape and style) that are compared at SCALES too
SCALES = np.array([0.86, 0.93, 1.0, 1.08, 1.16], np.float32)  # the area of a blurred clip misleads
LEAST_FRAMES = 3  # frames that must show the object before its shape and motion are read
COARSE = 15.0  # degrees between the angles that are tried to name a shape
MEDIUM = 5.0  # the same to fit a turn
FINE = 3.0  # the same to read an angle
FASTEST = 4.5  # radians per second, above the turn of every scene
ALIAS = 0.45  # of a symmetry's period per frame, beyond which a turn aliases
RATES = 61  # turns that are tried; the middle one is rest
BETTER = 0.01  # of cosine by which a turn must fit better than rest
TRAVEL = 0.1  # frame heights that a bounce goes back and forth at least
OFF_LINE = 0.035  # frame heights by which a bounce leaves a straight line in time
LEAST_STRENGTH = 0.5  # of a slow scene's motion, below which a motion is "none"


def score(
    videos: Sequence[np.ndarray] | np.ndarray,
    attributes: Sequence[Mapping[str, Any]],
    fps: float = 8.0,
    **vocabulary: Sequence[str],
) -> dict[str, Any]:
    """Score how well clips show the words of their prompts.

    videos: n clips uint8 [t h w 3]; attributes: for each the wanted {"colour", "shape",
    "motion"} (more keys are ignored); vocabulary: the keywords of `read_attributes`.
    Returns "count"; "accuracy" and "chance", each a dict over colour, shape, motion and "all";
    "confusion", for each attribute {"labels", "matrix" int [wanted, read]}; and "readings".
    Chance is the expected accuracy when the same clips answer the prompts in random order.
    Raises ValueError if the numbers of clips and prompts differ or there are none.
    """
    if len(videos) != len(attributes) or not len(videos):
        raise ValueError(
            f"score needs one prompt for each clip, and at least one: got "
            f"{len(videos)} clips and {len(attributes)} prompts."
        )
    readings = [read_attributes(video, fps, **vocabulary) for video in videos]

    # Each attribute, and all together.
    accuracy = {}
    chance = {}
    columns = {name: (name,) for name in ATTRIBUTES} | {"all": ATTRIBUTES}
    for name, keys in columns.items():
        wanted = [" ".join(str(words[key]) for key in keys) for words in attributes]
        read = [" ".join(words[key] for key in keys) for words in readings]
        pairs = zip(wanted, read, strict=True)
        accuracy[name] = sum(one == other for one, other in pairs) / len(read)
        chance[name] = _chance(wanted, read)

    # The words that are read for each word that is wanted.
    confusion = {}
    for name in ATTRIBUTES:
        confusion[name] = _confusion(
            [str(words[name]) for words in attributes], [words[name] for words in readings]
        )
    return {
        "count": len(readings),
        "accuracy": accuracy,
        "chance": chance,
        "readings": readings,
        "confusion": confusion,
    }


def _chance(wanted: Sequence[str], read: Sequence[str]) -> float:
    """Return the expected accuracy of the readings in random order."""
    often = Counter(read)
    hits = sum(count * often[word] for word, count in Counter(wanted).items())
    return hits / len(read) ** 2


def _confusion(wanted: Sequence[str], read: Sequence[str]) -> dict[str, Any]:
    """Count {"labels", "matrix" int [wanted, read]}."""
    labels = [*sorted({*wanted, *read} - {NONE}), NONE]
    matrix = np.zeros((len(labels), len(labels)), int)
    for one, other in zip(wanted, read, strict=True):
        matrix[labels.index(one), labels.index(other)] += 1
    return {"labels": labels, "matrix": matrix.tolist()}


def read_attributes(
    video: np.ndarray,
    fps: float = 8.0,
    colours: Sequence[str] = tuple(COLOURS),
    shapes: Sequence[str] = SHAPES,
    motions: Sequence[str] = MOTIONS,
) -> dict[str, str]:
    """Read {"colour", "shape", "motion"} of a clip's object, "none" if unreadable.

    video: uint8 [t h w 3] of one object, static camera, 8 frames and 32 pixels or more;
    fps: frames per second; colours, shapes, motions: the words to choose from.
    Raises ValueError for another dtype or shape.
    """
    nothing = dict.fromkeys(ATTRIBUTES, NONE)
    track = track_object(video, colours)
    if track is None:
        return nothing

    # Shape and motion need the object in half of the frames.
    if len(track.seen) < max(LEAST_FRAMES, len(video) // 2):
        return {**nothing, "colour": track.colour}

    shape, style = _name_shape(track, shapes)
    motion = _name_motion(track, fps, shape, style, motions)
    return {"colour": track.colour, "shape": shape, "motion": motion}


def read_angles(track: Track, shapes: Sequence[str] = SHAPES) -> tuple[np.ndarray, float]:
    """Read the angles [frames seen] of an object, and its shape's period.

    Angles and period are clockwise radians. The period is 0 for a shape that looks the same at
    every angle, and for one that cannot be read.
    """
    shape, style = _name_shape(track, shapes)
    if shape not in SYMMETRY:
        return np.zeros(len(track.seen)), 0.0
    angles = _angles(shape, FINE)
    best = [track.likeness(f, shape, style, angles).argmax() for f in track.seen.tolist()]
    return angles[best], math.tau / SYMMETRY[shape]


def _angles(shape: str, step: float) -> np.ndarray:
    """Return angles over one period of a shape, about `step` degrees apart."""
    if shape not in SYMMETRY:
        return np.zeros(1, np.float32)
    period = math.tau / SYMMETRY[shape]
    count = math.ceil(math.degrees(period) / step)
    return (np.arange(count) * (period / count)).astype(np.float32)


def _name_shape(track: Track, shapes: Sequence[str]) -> tuple[str, str]:
    """Name (shape, style) of the object, from the frames where it is largest."""
    largest = np.argsort(-track.area[track.seen])[:SHAPE_FRAMES]
    frames = track.seen[largest].tolist()

    likeness = {}
    best_angles = {}
    for look in itertools.product(shapes, STYLES):
        angles = _angles(look[0], COARSE)
        cosines = np.stack([track.likeness(f, *look, angles) for f in frames])  # frames, angles
        likeness[look] = float(cosines.max(1).mean())
        best_angles[look] = angles[cosines.argmax(1)]

    # The areas of imperfect clips mislead a little: resize and blur the best looks.
    for look in sorted(likeness, key=likeness.__getitem__)[-FINALISTS:]:
        fits = []
        for frame, angle in zip(frames, best_angles[look], strict=True):
            cosines = track.likeness(frame, *look, angle[None], SCALES, loose=True)
            fits.append(cosines.max())
        likeness[look] = 1.0 + float(np.mean(fits))  # above every look that is no finalist

    best = max(likeness, key=likeness.__getitem__)
    shape, style = best
    return (shape if likeness[best] > 1.0 + LIKENESS else NONE), style


def _name_motion(track: Track, fps: float, shape: str, style: str, motions: Sequence[str]) -> str:
    """Name the strongest motion, each measured against a slow motion of scenes."""
    height, width = track.amount.shape[1:]
    times = track.seen / fps
    x, y = (track.centre[track.seen] / (width, height)).T

    # Speeds in frame widths and heights per second, relative growth and turn per second.
    dx = np.polyfit(times, x, 1)[0]
    dy = np.polyfit(times, y, 1)[0]
    swell = np.polyfit(times, 0.5 * np.log(track.area[track.seen]), 1)[0]
    spin = _turning(track, times, shape, style)
    slow = SPEEDS["slow"]
    strength = {
        "left": -dx / slow,
        "right": dx / slow,
        "up": -dy / slow,
        "down": dy / slow,
        "grow": swell / (GROWTH * slow),
        "shrink": -swell / (GROWTH * slow),
        "turn": spin / (TURN * slow),
    }

    # A reversal is a bounce, whatever the mean velocity.
    there_and_back = float(np.abs(np.diff(y)).sum() - abs(y[-1] - y[0]))
    off_line = float(np.std(y - np.polyval(np.polyfit(times, y, 1), times)))
    if there_and_back > TRAVEL and off_line > OFF_LINE:
        strength["bounce"] = 10.0
    best = max(strength, key=strength.__getitem__)
    return best if strength[best] > LEAST_STRENGTH and best in motions else NONE


def _turning(track: Track, times: np.ndarray, shape: str, style: str) -> float:
    """Fit a constant turn, clockwise radians per second; 0 if none fits."""
    if shape not in SYMMETRY or len(times) < LEAST_FRAMES:
        return 0.0
    angles = _angles(shape, MEDIUM)
    period = math.tau / SYMMETRY[shape]
    frames = track.seen.tolist()
    cosines = np.stack([track.likeness(f, shape, style, angles) for f in frames])  # frames, angles

    # The column of `cosines` of each hypothesis: [rates, starts, frames].
    fastest = min(FASTEST, ALIAS * period / float(np.median(np.diff(times))))
    rates = np.linspace(-fastest, fastest, RATES)
    rotation = rates[:, None, None] * times / period * len(angles)
    column = np.rint(rotation + np.arange(len(angles))[:, None]).astype(int) % len(angles)

    fit = cosines[np.arange(len(times)), column].mean(-1).max(-1)  # rates
    best = int(fit.argmax())
    if fit[best] <= fit[RATES // 2] + BETTER:
        return 0.0
    return float(rates[best])
