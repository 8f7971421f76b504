"""Does a generated clip show what its prompt says? Colour, shape and motion, read from pixels.

The reader knows how `vdx.data.scenes` draws, and nothing of what was asked for. It reads clips
of one object under a static camera: it estimates the background, names the colour that best
explains what differs from it, follows the amount of that colour from frame to frame, and
compares it with drawn templates. Of several objects it reads one, which is not defined.
What cannot be read with confidence is "none", which is never right.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vdx.data.scenes.drawing import (
    BACKGROUNDS,
    COLOURS,
    EXTENT,
    FILL,
    SHAPES,
    STYLES,
    background,
    paint,
)
from vdx.data.scenes.world import GROWTH, MOTIONS, SPEEDS, TURN

__all__ = ["ATTRIBUTES", "Track", "read_angles", "read_attributes", "score", "track_object"]

ATTRIBUTES = ("colour", "shape", "motion")
NONE = "none"
SYMMETRY = {"square": 4, "triangle": 3, "star": 5, "cross": 4}  # equal looks in a full turn
DIFFERENT = 36.0  # of 441: how far a pixel's colour is from the background's to count
MISFIT = 40.0  # a named colour explains the object's pixels to within this distance
LIKENESS = 0.85  # cosine with its template below which a shape is not believed
GRID = 32  # samples along a template's side; finer windows are subsampled
SHAPE_FRAMES = 5  # frames that vote on the shape
FINALISTS = 7  # looks (shape and style) that are compared at these sizes too
SCALES = np.array([0.86, 0.93, 1.0, 1.08, 1.16], np.float32)


def _rgb(colour: str) -> np.ndarray:
    return np.array(COLOURS[colour], np.float32)


def _estimate_background(video: np.ndarray) -> np.ndarray:
    """float32 [h w 3]: a plain colour or a known pattern, whichever the video shows.

    The level of each channel comes from the frame's border, which an object hardly covers,
    so a clip that is slightly too bright or tinted is read all the same.
    """
    height, width = video.shape[1:3]
    rim = np.ones((height, width), bool)
    rim[2:-2, 2:-2] = False
    best, least = np.zeros((height, width, 3), np.float32), np.inf
    patterned = [name for name, (_, _, pattern) in BACKGROUNDS.items() if pattern]
    for name in ["black", *patterned]:  # black plus any level is any plain colour
        back = background(name, np.zeros(1), height, width)[0]
        back = back + np.median((video - back)[:, rim], axis=(0, 1))
        error = float(np.minimum(np.abs(video - back), 60.0).mean())
        if error < least:
            best, least = back, error
    return best


def _name_colour(pixels: np.ndarray, behind: np.ndarray, colours: Sequence[str]) -> str:
    """The colour whose blends with what is behind explain the pixels [n 3]; or "none".

    A blend is a point on the segment from the background to the colour, which covers soft and
    antialiased edges, or to the darker fill of an outlined shape.
    """
    errors = {}
    for name in colours:
        nearest = np.full(len(pixels), np.inf)
        for shade in (1.0, FILL):
            line = _rgb(name) * shade - behind
            along = ((pixels - behind) * line).sum(-1) / np.maximum((line * line).sum(-1), 1.0)
            rest = pixels - behind - np.clip(along, 0.0, 1.0)[:, None] * line
            nearest = np.minimum(nearest, (rest * rest).sum(-1))
        errors[name] = float(np.minimum(nearest, (2 * MISFIT) ** 2).mean())
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < MISFIT**2 else NONE


def _template(shape: str, style: str, dx, dy, radius, angle, contrast: float):
    """How much of its own colour a drawn shape shows at the offsets: 1 inside a flat one.

    contrast: how much darker than the colour the background is, along the colour; it says
    how much the fill of an outlined shape counts.
    """
    cover, shade = paint(shape, style, dx, dy, radius, angle)
    return cover * np.maximum(1.0 - (1.0 - shade) * contrast, 0.0)


@functools.lru_cache(maxsize=1024)
def _area(shape: str, style: str, contrast: float) -> float:
    """Sum of a template over the square of its radius."""
    line = np.arange(-50, 51, dtype=np.float32)
    return float(_template(shape, style, line, line[:, None], 40.0, 0.0, contrast).sum()) / 1600.0


class Track:
    """The object through the frames: amount of its colour, and centre and area where seen.

    amount [t h w]: 1 where a pixel has the object's colour, 0 where it has the background's;
    area [t], centre [t 2]: in pixels, x and y from the upper left corner; seen: int, the frames
    in which there is enough of it.
    """

    def __init__(self, video: np.ndarray, back: np.ndarray, colour: str):
        self.colour = colour
        line = _rgb(colour) - back
        power = np.maximum((line * line).sum(-1), 1.0)
        self.amount = np.clip(((video - back) * line).sum(-1) / power, 0.0, 1.2)
        # What is faint is noise; above it even the dark fill of an outlined shape counts.
        faint = self.amount[self.amount < 0.2]
        floor = min(max(0.2, 5.5 * float(np.sqrt((faint * faint).mean()))), 0.4)
        mass = np.where(self.amount > floor, self.amount, 0.0)
        height, width = mass.shape[1:]
        self.area = mass.sum((1, 2))
        self.seen = np.flatnonzero(self.area > 0.003 * height * width)
        area = np.maximum(self.area, 1e-6)
        x = (mass.sum(1) * (np.arange(width) + 0.5)).sum(-1) / area
        y = (mass.sum(2) * (np.arange(height) + 0.5)).sum(-1) / area
        self.centre = np.stack([x, y], -1)  # pixels
        weight = mass.sum(0)
        tone = (back * weight[..., None]).sum((0, 1)) / max(float(weight.sum()), 1e-6)
        own = _rgb(colour)
        reach = float(((own - tone) ** 2).sum())
        # Rounded so that the areas, which depend on it, are computed only a few times.
        self.contrast = round(float((own * (own - tone)).sum()) / max(reach, 1.0), 1)

    def likeness(
        self,
        frame: int,
        shape: str,
        style: str,
        angles: np.ndarray,
        scales: np.ndarray | float = 1.0,
        loose: bool = False,
    ) -> np.ndarray:
        """Cosine [n] between the object in a frame and its template at n angles or scales.

        The template's radius is the one with the object's area, times the scale. loose: the
        template may also be blurred, whichever is more like the object.
        """
        radius = math.sqrt(self.area[frame] / _area(shape, style, self.contrast)) * scales
        reach, (height, width) = EXTENT * float(np.max(radius)) + 1.5, self.amount.shape[1:]
        (x, y), step = self.centre[frame], max(1, math.ceil(2 * reach / GRID))
        cols = np.arange(max(0, int(x - reach)), min(width, int(x + reach) + 1), step)
        rows = np.arange(max(0, int(y - reach)), min(height, int(y + reach) + 1), step)
        dx, dy = (cols + 0.5 - x).astype(np.float32), (rows + 0.5 - y).astype(np.float32)
        amount = self.amount[frame][rows[:, None], cols]
        drawn = _template(
            shape,
            style,
            dx,
            dy[:, None],
            np.reshape(radius, (-1, 1, 1)),
            angles[:, None, None],
            self.contrast,
        ).reshape(-1, *amount.shape)
        result = _cosine(drawn, amount)
        return np.maximum(result, _cosine(_blur(drawn), amount)) if loose else result


def _cosine(drawn: np.ndarray, amount: np.ndarray) -> np.ndarray:
    power = (drawn * drawn).sum((1, 2)) * (amount * amount).sum()
    return (drawn * amount).sum((1, 2)) / np.sqrt(np.maximum(power, 1e-12))


def _blur(drawn: np.ndarray) -> np.ndarray:
    """The pictures [n h w] under the binomial filter [1 2 1] / 4 along both axes."""
    down = 0.5 * drawn
    down[:, 1:] += 0.25 * drawn[:, :-1]
    down[:, :-1] += 0.25 * drawn[:, 1:]
    both = 0.5 * down
    both[..., 1:] += 0.25 * down[..., :-1]
    both[..., :-1] += 0.25 * down[..., 1:]
    return both


def _angles(shape: str, step: float) -> np.ndarray:
    """Angles over one period of the shape's symmetry, about `step` degrees apart."""
    if shape not in SYMMETRY:
        return np.zeros(1, np.float32)
    period = math.tau / SYMMETRY[shape]
    count = math.ceil(math.degrees(period) / step)
    return (np.arange(count) * (period / count)).astype(np.float32)


def _name_shape(track: Track, shapes: Sequence[str]) -> tuple[str, str]:
    """(shape, style) most like the object where it is largest, each frame at its best angle."""
    frames = track.seen[np.argsort(-track.area[track.seen])[:SHAPE_FRAMES]].tolist()
    marks, turns = {}, {}
    for look in itertools.product(shapes, STYLES):
        angles = _angles(look[0], 15.0)
        likeness = np.stack([track.likeness(f, *look, angles) for f in frames])
        marks[look], turns[look] = float(likeness.max(1).mean()), angles[likeness.argmax(1)]
    # The areas of imperfect clips mislead a little, so the best looks may be resized and blurred.
    for look in sorted(marks, key=marks.__getitem__)[-FINALISTS:]:
        fits = [
            track.likeness(f, *look, turn[None], SCALES, loose=True).max()
            for f, turn in zip(frames, turns[look], strict=True)
        ]
        marks[look] = 1.0 + float(np.mean(fits))  # above all that were not finalists
    best = max(marks, key=marks.__getitem__)
    return best if marks[best] > 1.0 + LIKENESS else (NONE, best[1])


def read_angles(track: Track, shapes: Sequence[str] = SHAPES) -> tuple[np.ndarray, float]:
    """(clockwise radians [frames seen] by which the object is turned, the period in which its
    shape looks the same); period 0 where it always does, or the shape cannot be read."""
    shape, style = _name_shape(track, shapes)
    if shape not in SYMMETRY:
        return np.zeros(len(track.seen)), 0.0
    angles = _angles(shape, 3.0)
    marks = [track.likeness(f, shape, style, angles).argmax() for f in track.seen.tolist()]
    return angles[marks], math.tau / SYMMETRY[shape]


def _turning(track: Track, times: np.ndarray, shape: str, style: str) -> float:
    """Clockwise radians per second of the constant turn that fits all frames; 0 if none does."""
    if shape not in SYMMETRY or len(times) < 3:
        return 0.0
    angles, period = _angles(shape, 5.0), math.tau / SYMMETRY[shape]
    marks = np.stack([track.likeness(f, shape, style, angles) for f in track.seen.tolist()])
    fastest = min(4.5, 0.45 * period / float(np.median(np.diff(times))))  # beyond, it aliases
    rates = np.linspace(-fastest, fastest, 61)
    # [rates, starts, frames]: which column of `marks` each hypothesis looks at.
    turned = rates[:, None, None] * times / period * len(angles)
    column = np.rint(turned + np.arange(len(angles))[:, None]).astype(int) % len(angles)
    fit = marks[np.arange(len(times)), column].mean(-1).max(-1)
    best = int(fit.argmax())
    return float(rates[best]) if fit[best] > fit[30] + 0.01 else 0.0


def _name_motion(track: Track, fps: float, shape: str, style: str, motions) -> str:
    """The strongest of the motions, each measured against what scenes call slow."""
    frame = track.amount.shape[1:]
    times = track.seen / fps
    x, y = (track.centre[track.seen] / (frame[1], frame[0])).T
    dx, dy = np.polyfit(times, x, 1)[0], np.polyfit(times, y, 1)[0]
    swell = np.polyfit(times, 0.5 * np.log(track.area[track.seen]), 1)[0]
    spin = _turning(track, times, shape, style)
    there_and_back = float(np.abs(np.diff(y)).sum() - abs(y[-1] - y[0]))
    off_line = float(np.std(y - np.polyval(np.polyfit(times, y, 1), times)))
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
    if there_and_back > 0.1 and off_line > 0.035:
        strength["bounce"] = 10.0  # a reversal, whatever the mean velocity says
    best = max(strength, key=strength.__getitem__)
    return best if strength[best] > 0.5 and best in motions else NONE


def read_attributes(
    video: np.ndarray,
    fps: float = 8.0,
    colours: Sequence[str] = tuple(COLOURS),
    shapes: Sequence[str] = SHAPES,
    motions: Sequence[str] = MOTIONS,
) -> dict[str, str]:
    """{"colour", "shape", "motion"} of the object in a clip, "none" for what is not readable.

    video: uint8 [t h w 3] of one object, static camera, 8 frames and 32 pixels or more;
    fps: frames per second; colours, shapes, motions: the words to choose from.
    Raises ValueError for another dtype or shape.
    """
    track, nothing = track_object(video, colours), dict.fromkeys(ATTRIBUTES, NONE)
    if track is None:
        return nothing
    if len(track.seen) < max(3, len(video) // 2):
        return {**nothing, "colour": track.colour}
    shape, style = _name_shape(track, shapes)
    return {
        "colour": track.colour,
        "shape": shape,
        "motion": _name_motion(track, fps, shape, style, motions),
    }


def track_object(video: np.ndarray, colours: Sequence[str] = tuple(COLOURS)) -> Track | None:
    """Follows the object of a clip that `read_attributes` can read; None where none is found."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise ValueError(
            f"read_attributes takes uint8 [t h w 3], not {video.dtype} {list(video.shape)}."
        )
    frames = video.astype(np.float32)
    back = _estimate_background(frames)
    differs = ((frames - back) ** 2).sum(-1) > _threshold(frames - back) ** 2
    where = np.argwhere(differs)
    if len(where) < 0.003 * differs.size:
        return None
    t, h, w = where[:: max(1, len(where) // 2000)].T
    colour = _name_colour(frames[t, h, w], back[h, w], colours)
    return None if colour == NONE else Track(frames, back, colour)


def _threshold(residual: np.ndarray) -> float:
    """Colour distance that noise does not reach; the noise is read where little differs."""
    noise = 1.48 * float(np.median(np.abs(residual)))
    return max(DIFFERENT, min(4.5 * noise, 2.5 * DIFFERENT))


def score(
    videos: Sequence[np.ndarray] | np.ndarray,
    attributes: Sequence[Mapping[str, Any]],
    fps: float = 8.0,
    **vocabulary: Sequence[str],
) -> dict[str, Any]:
    """How well clips show what was asked for.

    videos: n clips uint8 [t h w 3]; attributes: for each the wanted {"colour", "shape",
    "motion"} (more keys are ignored); vocabulary: as `read_attributes` takes it.
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
    count = len(readings)
    columns = {name: (name,) for name in ATTRIBUTES} | {"all": ATTRIBUTES}
    accuracy, chance = {}, {}
    for name, keys in columns.items():
        wanted = [" ".join(str(a[k]) for k in keys) for a in attributes]
        read = [" ".join(r[k] for k in keys) for r in readings]
        accuracy[name] = sum(w == r for w, r in zip(wanted, read, strict=True)) / count
        often = Counter(read)
        chance[name] = sum(n * often[w] for w, n in Counter(wanted).items()) / count**2
    return {
        "count": count,
        "accuracy": accuracy,
        "chance": chance,
        "readings": readings,
        "confusion": {
            name: _confusion([str(a[name]) for a in attributes], [r[name] for r in readings])
            for name in ATTRIBUTES
        },
    }


def _confusion(wanted: list[str], read: list[str]) -> dict[str, Any]:
    labels = [*sorted({*wanted, *read} - {NONE}), NONE]
    matrix = np.zeros((len(labels), len(labels)), int)
    for w, r in zip(wanted, read, strict=True):
        matrix[labels.index(w), labels.index(r)] += 1
    return {"labels": labels, "matrix": matrix.tolist()}
