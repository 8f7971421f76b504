"""Footage whose cuts and gradual transitions are known, drawn from a seed.

Shots are photographs under a moving camera, with moving objects and the events that mislead
detectors of cuts: flashes, strobes, whip pans, occluders. Photographs are drawn as leaves that
cover one another, whose statistics are those of natural images (Lee, Mumford and Huang 2001), and
taken from a folder where there is one.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from vdx.data.encoding import X264, add_stream, yuv_frame

WIDTH, HEIGHT = 400, 224
SCALE = 2.2  # of a photograph to a frame, along each side
RATES = (24, 25, 30)  # frames a second
EVENTS = ("flash", "strobe", "whip", "occluder")
COPIES = ("re-encoded", "resized", "mirrored")
MOTIONS = ("still", "pan", "zoom", "roll", "handheld", "shake")


@dataclasses.dataclass
class Planted:
    """A file and what is planted in it."""

    path: Path
    fps: int
    frames: int
    hard: list[int]  # first frames of new shots
    gradual: list[tuple[int, int]]  # first mixed frame, first frame of the new shot alone


class Piece(NamedTuple):
    """A shot, and the transition that leads to it."""

    frames: np.ndarray  # uint8 [t h w 3]
    transition: str = "hard"  # hard, dissolve or fade
    length: int = 0  # frames of the transition


def draw_photograph(rng: np.random.Generator) -> np.ndarray:
    """Return a drawn photograph uint8 [h w 3], larger than a frame."""
    height, width = int(HEIGHT * SCALE), int(WIDTH * SCALE)
    palette = rng.uniform(0, 255, (rng.integers(4, 12), 3))
    image = np.full((height, width, 3), palette[0], np.float32)
    smallest = float(rng.uniform(5, 20))
    radii = smallest / np.sqrt(rng.uniform(0.002, 1, int(rng.integers(150, 900))))
    for radius in radii:
        colour = (palette[rng.integers(len(palette))] + rng.normal(0, 20, 3)).tolist()
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        corners = int(rng.integers(3, 9))
        if corners > 6:
            axes = (int(radius), int(radius * rng.uniform(0.3, 1)))
            cv2.ellipse(image, centre, axes, rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)
            continue
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        points = np.stack([np.cos(angles), np.sin(angles)], -1) * radius + centre
        cv2.fillPoly(image, [points.astype(np.int32)], colour, cv2.LINE_AA)

    # Texture on several scales, and light that falls unevenly.
    for cells in (3, 12, 50, 200):
        noise = rng.normal(0, 1, (cells * 9 // 16 + 1, cells)).astype(np.float32)
        strength = rng.uniform(4, 16)
        image += (
            strength * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
        )
    image *= rng.uniform(0.35, 1.0)
    return np.clip(image, 0, 255).astype(np.uint8)


def load_photographs(folder: Path) -> list[np.ndarray]:
    """Return the images of a folder, and frames of its videos, as large as drawn ones."""
    images = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            images.append(cv2.imread(str(path)))
        elif path.suffix.lower() == ".mp4":
            images.append(cv2.VideoCapture(str(path)).read()[1])
    size = int(WIDTH * SCALE), int(HEIGHT * SCALE)
    return [
        cv2.resize(image[..., ::-1], size, interpolation=cv2.INTER_AREA)
        for image in images
        if image is not None and min(image.shape[:2]) >= HEIGHT
    ]


def camera_path(rng: np.random.Generator, frames: int, motion: str) -> np.ndarray:
    """Return (x, y, zoom, angle) of each frame, float64 [frames 4].

    x and y are of the centre, in widths of the frame from the centre of the photograph.
    """
    time = np.linspace(-0.5, 0.5, frames)
    path = np.zeros((frames, 4))
    path[:, :2] = rng.uniform(-0.15, 0.15, 2)
    path[:, 2] = rng.uniform(1.0, 1.4)
    path[:, 3] = rng.uniform(-3, 3)
    if motion == "pan":
        angle = rng.uniform(0, 2 * np.pi)
        speed = rng.uniform(0.002, 0.012) * frames  # widths in all
        speed = min(speed, 0.6)
        path[:, 0] += speed * np.cos(angle) * time
        path[:, 1] += speed * np.sin(angle) * time * 0.6
    if motion == "zoom":
        path[:, 2] *= np.exp(rng.choice([-1, 1]) * rng.uniform(0.1, 0.5) * time)
    if motion == "roll":
        path[:, 3] += rng.choice([-1, 1]) * rng.uniform(5, 25) * time
    if motion == "handheld":
        phases = rng.uniform(0, 2 * np.pi, (3, 4))
        for rate, phase in zip((1, 2.3, 4.1), phases, strict=True):
            path += (
                np.sin(rate * 2 * np.pi * time[:, None] + phase) * (0.01, 0.01, 0.01, 0.5) / rate
            )
    if motion == "shake":
        path[:, :2] += rng.normal(0, 0.008, (frames, 2))
    return path


def whip(path: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a camera path with a whip pan of a few frames."""
    frames = len(path)
    length = int(rng.integers(5, 10))
    start = int(rng.integers(8, max(9, frames - length - 8)))
    step = np.clip((np.arange(frames) - start) / length, 0, 1)
    smooth = step**2 * (3 - 2 * step)
    moved = path.copy()
    moved[:, 0] += rng.choice([-1, 1]) * 0.8 * (smooth - 0.5)
    return moved


def render(photograph: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Return the frames uint8 [t h w 3] that a camera on `path` sees, with its motion blur."""
    height, width = photograph.shape[:2]
    following = np.concatenate([path[1:], path[-1:]])
    return np.stack(
        [
            _expose(photograph, here, following[number], (height, width))
            for number, here in enumerate(path)
        ]
    )


def _expose(
    photograph: np.ndarray, here: np.ndarray, there: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Return one frame; the shutter is open for half of the way to the next one."""
    distance = WIDTH * float(np.abs(there - here)[:2].max())
    samples = int(np.clip(distance / 4, 1, 8))
    views = []
    for share in np.arange(samples) / samples / 2:
        x, y, zoom, angle = here + share * (there - here)
        centre = size[1] / 2 + x * WIDTH, size[0] / 2 + y * WIDTH
        matrix = cv2.getRotationMatrix2D(centre, float(angle), float(zoom))
        matrix[:, 2] += (WIDTH / 2 - centre[0], HEIGHT / 2 - centre[1])
        views.append(
            cv2.warpAffine(photograph, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
        )
    return np.mean(views, axis=0).astype(np.uint8) if samples > 1 else views[0]


def add_object(
    frames: np.ndarray, texture: np.ndarray, rng: np.random.Generator, size: float, seconds: float
) -> None:
    """Draw an object that crosses the frames, in place.

    size: of its radius to the height of a frame. seconds: of the crossing, in frames / 25.
    """
    radius = max(6, int(size * HEIGHT))
    sprite = cv2.resize(texture, (2 * radius, 2 * radius))
    mask = np.zeros((2 * radius, 2 * radius), np.uint8)
    cv2.circle(mask, (radius, radius), radius, 255, -1)
    direction = rng.choice([-1, 1])
    begin = int(rng.integers(0, max(1, len(frames) - 10)))
    row = int(rng.integers(0, HEIGHT))
    if size > 0.7:
        row = HEIGHT // 2
    for number, frame in enumerate(frames[begin:]):
        place = (number / (25 * seconds)) * (WIDTH + 2 * radius) - radius
        column = int(place if direction > 0 else WIDTH - place)
        _paste(frame, sprite, mask, column - radius, row - radius)


def _paste(frame: np.ndarray, sprite: np.ndarray, mask: np.ndarray, left: int, top: int) -> None:
    """Draw a sprite at (left, top) of a frame, in place; parts outside are not drawn."""
    height, width = frame.shape[:2]
    rows = slice(max(top, 0), min(top + len(sprite), height))
    columns = slice(max(left, 0), min(left + sprite.shape[1], width))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    inner = (
        slice(rows.start - top, rows.stop - top),
        slice(columns.start - left, columns.stop - left),
    )
    shown = mask[inner] > 0
    frame[rows, columns][shown] = sprite[inner][shown]


def flash(frames: np.ndarray, rng: np.random.Generator, period: int = 0) -> None:
    """Brighten 1 to 3 frames, in place; every `period` frames for a strobe."""
    start = int(rng.integers(6, max(7, len(frames) - 8)))
    starts = range(start, len(frames) - 6, period) if period else [start]
    for first in starts:
        last = first + int(rng.integers(1, 4 if not period else 3))
        strength = rng.uniform(0.5, 1.0)
        part = frames[first:last].astype(np.float32)
        frames[first:last] = (part + strength * (255 - part)).astype(np.uint8)


def shot(
    rng: np.random.Generator,
    photograph: np.ndarray,
    textures: Sequence[np.ndarray],
    frames: int,
    motion: str | None = None,
    event: str | None = None,
) -> np.ndarray:
    """Return the frames uint8 [t h w 3] of a shot without a cut.

    textures: of the objects that move before the photograph.
    """
    first, second = rng.integers(0, len(textures), 2)
    path = camera_path(rng, frames, motion or str(rng.choice(MOTIONS)))
    if event == "whip":
        path = whip(path, rng)
    pixels = render(photograph, path)
    for _ in range(int(rng.integers(0, 3))):
        add_object(pixels, textures[first], rng, rng.uniform(0.08, 0.3), rng.uniform(0.8, 4))
    if event == "occluder":
        add_object(pixels, textures[second], rng, rng.uniform(0.8, 1.1), rng.uniform(0.7, 1.6))
    if event == "flash":
        flash(pixels, rng)
    if event == "strobe":
        flash(pixels, rng, period=int(rng.integers(4, 10)))
    return pixels


def assemble(pieces: Sequence[Piece]) -> tuple[np.ndarray, list[int], list[tuple[int, int]]]:
    """Return the frames, the hard cuts and the gradual transitions of a sequence of shots."""
    pixels = pieces[0].frames
    hard = []
    gradual = []
    for piece in pieces[1:]:
        length = piece.length
        if piece.transition == "hard":
            hard.append(len(pixels))
            pixels = np.concatenate([pixels, piece.frames])
            continue
        start = len(pixels) - length
        rise = (np.arange(1, length + 1) / (length + 1))[:, None, None, None]
        if piece.transition == "dissolve":
            mixed = (1 - rise) * pixels[start:] + rise * piece.frames[:length]
        else:  # to black, and from it
            fall = np.maximum(1 - 2 * rise, 0)
            grow = np.maximum(2 * rise - 1, 0)
            mixed = fall * pixels[start:] + grow * piece.frames[:length]
        gradual.append((start, start + length))
        pixels = np.concatenate([pixels[:start], mixed.astype(np.uint8), piece.frames[length:]])
    return pixels, hard, gradual


def encode(path: Path, frames: np.ndarray, fps: int, crf: int = 20) -> None:
    """Write frames uint8 [t h w 3] as H.264 in mp4."""
    rate = Fraction(fps)
    options = X264 | {"crf": str(crf), "preset": "veryfast"}
    with av.open(str(path), "w", format="mp4") as out:
        stream = add_stream(out, rate, *frames.shape[1:3], options)
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(frames):
            out.mux(stream.encode(yuv_frame(frame, number, rate)))
        out.mux(stream.encode(None))


def make_footage(
    seed: int, folder: Path, count: int, photographs: Path | None = None
) -> list[Planted]:
    """Write `count` files of several shots each, and return what is planted in them.

    Half of the transitions is gradual; half of the shots has an event that is no cut. No photograph
    is the background of two shots.
    """
    rng = np.random.default_rng(seed)
    pool = load_photographs(photographs) if photographs else []
    pool += [draw_photograph(rng) for _ in range(5)]
    deck = [pool[n] for n in rng.permutation(len(pool))]
    return [_make_file(rng, deck, pool, folder / f"{seed}_{n:03d}.mp4") for n in range(count)]


def _make_file(
    rng: np.random.Generator, deck: list[np.ndarray], pool: Sequence[np.ndarray], path: Path
) -> Planted:
    """Write one file of shots, each of another photograph, taken from `deck`."""
    pieces = []
    for _ in range(int(rng.integers(2, 6))):
        event = str(rng.choice(EVENTS)) if rng.random() < 0.5 else None
        photograph = deck.pop() if deck else draw_photograph(rng)
        frames = shot(rng, photograph, pool, int(rng.integers(65, 100)), event=event)
        transition = str(rng.choice(["hard", "hard", "dissolve", "fade"]))
        pieces.append(Piece(frames, transition, int(rng.integers(8, 31))))
    pixels, hard, gradual = assemble(pieces)
    fps = int(rng.choice(RATES))
    encode(path, pixels, fps, int(rng.integers(17, 27)))
    return Planted(path, fps, len(pixels), hard, gradual)


def make_copy(planted: Planted, path: Path, kind: str) -> None:
    """Write a near-duplicate of a file: re-encoded, resized or mirrored."""
    with av.open(str(planted.path)) as source:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)])
    if kind == "resized":
        frames = np.stack([cv2.resize(f, (256, 144), interpolation=cv2.INTER_AREA) for f in frames])
    if kind == "mirrored":
        frames = np.ascontiguousarray(frames[:, :, ::-1])
    encode(path, frames, planted.fps, crf=33 if kind == "re-encoded" else 23)
