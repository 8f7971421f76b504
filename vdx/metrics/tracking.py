"""Follow the object of a scene through a clip, from pixels.

The tracker uses the backgrounds and the colours of `vdx.data.scenes`, and no truth of the clip.
It follows one object under a static camera. Of several it follows one, which is undefined.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from vdx.data.scenes.drawing import BACKGROUNDS, COLOURS, EXTENT, FILL, background, paint

__all__ = ["NONE", "Track", "foreground", "track_object"]

NONE = "none"  # a reading that is not possible
DIFFERENT = 36.0  # of 441 levels: colour distance from the background that noise does not reach
NOISE_FACTOR = 4.5  # standard deviations of noise that a pixel must differ by
RIM = 2  # pixels along the border of the frame, which an object hardly covers
CUT_OFF = 60.0  # levels at which one pixel's misfit with a background stops counting
MISFIT = 40.0  # levels within which a named colour explains the object's pixels
LEAST_AREA = 0.003  # share of a frame; smaller objects are not read
SAMPLES = 2000  # pixels from which the colour is named
FAINT = 0.2  # amount of the object's colour below which a pixel is noise
GRID = 32  # samples along a template's side; finer windows are subsampled


def track_object(video: np.ndarray, colours: Sequence[str] = tuple(COLOURS)) -> "Track | None":
    """Follow the object of a clip uint8 [t h w 3]; None where no object is found.

    colours: the names to choose from. Raises ValueError for another dtype or shape.
    """
    _check(video)
    frames = video.astype(np.float32)
    back = _estimate_background(frames)
    where = np.argwhere(_differs(frames, back))
    if len(where) < LEAST_AREA * math.prod(video.shape[:3]):
        return None

    # Name the colour from a sample of the pixels.
    t, h, w = where[:: max(1, len(where) // SAMPLES)].T
    colour = _name_colour(frames[t, h, w], back[h, w], colours)
    if colour == NONE:
        return None
    return Track(frames, back, colour)


def foreground(video: np.ndarray) -> np.ndarray:
    """Find the pixels, bool [t h w], that differ from a clip's background.

    video: uint8 [t h w 3]. The background is a plain colour or a pattern of scenes, at rest.
    Raises ValueError for another dtype or shape.
    """
    _check(video)
    frames = video.astype(np.float32)
    return _differs(frames, _estimate_background(frames))


def _check(video: np.ndarray) -> None:
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise ValueError(f"A clip is {video.dtype} {list(video.shape)}, expected uint8 [t h w 3].")


def _rgb(colour: str) -> np.ndarray:
    return np.array(COLOURS[colour], np.float32)


def _estimate_background(video: np.ndarray) -> np.ndarray:
    """Estimate float32 [h w 3]: the plain colour or known pattern that fits best.

    The level of each channel comes from the frame's border, which an object hardly covers,
    so that a clip that is slightly too bright or tinted is read as well.
    """
    height, width = video.shape[1:3]
    rim = np.ones((height, width), bool)
    rim[RIM:-RIM, RIM:-RIM] = False

    # Each candidate at the level of the border; a cut-off keeps the object from deciding.
    best = np.zeros((height, width, 3), np.float32)
    least = np.inf
    patterned = [name for name, (_, _, pattern) in BACKGROUNDS.items() if pattern]
    for name in ["black", *patterned]:  # black plus any level is any plain colour
        back = background(name, np.zeros(1), height, width)[0]
        back = back + np.median((video - back)[:, rim], axis=(0, 1))
        error = float(np.minimum(np.abs(video - back), CUT_OFF).mean())
        if error < least:
            best = back
            least = error
    return best


def _differs(frames: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Compare frames with a background: bool [t h w]."""
    residual = frames - back
    return (residual**2).sum(-1) > _threshold(residual) ** 2


def _threshold(residual: np.ndarray) -> float:
    """Return a colour distance that noise does not reach.

    The noise is read where little differs: its deviation is 1.48 medians of the residual.
    """
    noise = 1.48 * float(np.median(np.abs(residual)))
    return max(DIFFERENT, min(NOISE_FACTOR * noise, 2.5 * DIFFERENT))


def _name_colour(pixels: np.ndarray, behind: np.ndarray, colours: Sequence[str]) -> str:
    """Name the colour whose blends with the background explain the pixels [n 3].

    The name is "none" if no colour does. A blend is a point on the segment from the background to
    the colour, which covers soft and antialiased edges, or to the darker fill of an outline.
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


class Track:
    """The object through the frames of a clip."""

    colour: str
    amount: np.ndarray  # [t h w]: 1 in the object's colour, 0 in the background's, up to 1.2
    area: np.ndarray  # [t] pixels
    centre: np.ndarray  # [t 2] pixels, x and y from the upper left corner
    seen: np.ndarray  # int [n], the frames that show enough of the object
    contrast: float  # of the colour to the background, along the colour: see `template`

    def __init__(self, video: np.ndarray, back: np.ndarray, colour: str):
        self.colour = colour
        line = _rgb(colour) - back
        power = np.maximum((line * line).sum(-1), 1.0)
        self.amount = np.clip(((video - back) * line).sum(-1) / power, 0.0, 1.2)

        # A faint amount is noise; above it even the dark fill of an outlined shape counts.
        faint = self.amount[self.amount < FAINT]
        noise = float(np.sqrt((faint * faint).mean()))
        floor = min(max(FAINT, 5.5 * noise), 2 * FAINT)
        mass = np.where(self.amount > floor, self.amount, 0.0)

        # Area and centre of each frame.
        height, width = mass.shape[1:]
        self.area = mass.sum((1, 2))
        self.seen = np.flatnonzero(self.area > LEAST_AREA * height * width)
        area = np.maximum(self.area, 1e-6)
        x = (mass.sum(1) * (np.arange(width) + 0.5)).sum(-1) / area
        y = (mass.sum(2) * (np.arange(height) + 0.5)).sum(-1) / area
        self.centre = np.stack([x, y], -1)
        self.contrast = _contrast(back, mass.sum(0), _rgb(colour))

    def likeness(
        self,
        frame: int,
        shape: str,
        style: str,
        angles: np.ndarray,
        scales: np.ndarray | float = 1.0,
        loose: bool = False,
    ) -> np.ndarray:
        """Return cosines [n] of a frame's object with its template at n angles or scales.

        The template's radius is the one with the object's area, times the scale. With `loose`,
        the template may also be blurred, if that is closer to the object.
        """
        radius = math.sqrt(self.area[frame] / _area(shape, style, self.contrast)) * scales
        reach = EXTENT * float(np.max(radius)) + 1.5
        height, width = self.amount.shape[1:]
        x, y = self.centre[frame]

        # Pixels around the object, subsampled if they are many.
        step = max(1, math.ceil(2 * reach / GRID))
        columns = np.arange(max(0, int(x - reach)), min(width, int(x + reach) + 1), step)
        rows = np.arange(max(0, int(y - reach)), min(height, int(y + reach) + 1), step)
        amount = self.amount[frame][rows[:, None], columns]  # h w

        # The template at the same pixels, for each angle or scale.
        drawn = template(
            shape,
            style,
            (columns + 0.5 - x).astype(np.float32),
            (rows + 0.5 - y).astype(np.float32)[:, None],
            np.reshape(radius, (-1, 1, 1)),
            angles[:, None, None],
            self.contrast,
        ).reshape(-1, *amount.shape)  # n h w
        result = _cosine(drawn, amount)
        if loose:
            result = np.maximum(result, _cosine(_blur(drawn), amount))
        return result


def _contrast(back: np.ndarray, weight: np.ndarray, own: np.ndarray) -> float:
    """Return how much darker than a colour [3] the background [h w 3] is, along it.

    weight [h w]: where the object is. Rounded, so that few areas of templates are computed.
    """
    tone = (back * weight[..., None]).sum((0, 1)) / max(float(weight.sum()), 1e-6)
    distance = float(((own - tone) ** 2).sum())
    return round(float((own * (own - tone)).sum()) / max(distance, 1.0), 1)


def template(
    shape: str,
    style: str,
    dx: np.ndarray,
    dy: np.ndarray,
    radius: np.ndarray | float,
    angle: np.ndarray | float,
    contrast: float,
) -> np.ndarray:
    """Draw the amount of its colour of a shape at offsets: 1 inside a flat one.

    contrast: see Track; it decides how much the darker fill of an outlined shape counts.
    """
    cover, shade = paint(shape, style, dx, dy, radius, angle)
    return cover * np.maximum(1.0 - (1.0 - shade) * contrast, 0.0)


@functools.lru_cache(maxsize=1024)
def _area(shape: str, style: str, contrast: float) -> float:
    """Return the sum of a template over its squared radius, measured at 40 pixels."""
    line = np.arange(-50, 51, dtype=np.float32)
    drawn = template(shape, style, line, line[:, None], 40.0, 0.0, contrast)
    return float(drawn.sum()) / 1600.0


def _cosine(drawn: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Return the cosines [n] between templates [n h w] and amounts [h w]."""
    power = (drawn * drawn).sum((1, 2)) * (amount * amount).sum()
    return (drawn * amount).sum((1, 2)) / np.sqrt(np.maximum(power, 1e-12))


def _blur(drawn: np.ndarray) -> np.ndarray:
    """Filter images [n h w] by the binomial filter [1 2 1] / 4 along both axes."""
    down = 0.5 * drawn
    down[:, 1:] += 0.25 * drawn[:, :-1]
    down[:, :-1] += 0.25 * drawn[:, 1:]
    both = 0.5 * down
    both[..., 1:] += 0.25 * down[..., :-1]
    both[..., :-1] += 0.25 * down[..., 1:]
    return both
