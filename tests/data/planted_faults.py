"""Clips of photographs with a moving camera and moving objects, and faults planted in some.

The same seed gives the same frames. Photographs come from scikit-image, an extra of the tests, so
nothing is downloaded. A clip is 400x224 at 24 frames a second and is encoded as H.264 in mp4.
"""

import dataclasses
import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from vdx.data.encoding import X264, add_stream, yuv_frame

HEIGHT = 224
WIDTH = 400
FPS = 24
FRAMES = 36
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
)
WORDS = ("SAMPLE", "www.footage.example", "Stock Video", "PREVIEW ONLY", "@holidayclips")
LINES = ("and then they went home", "Subscribe for more", "THE END OF PART ONE")

Draw = np.random.Generator


@dataclasses.dataclass
class Planted:
    """A clip and what was planted in it."""

    name: str
    faults: tuple[str, ...]  # reasons that a decision should give; () for a control
    frames: np.ndarray  # uint8 [t h w 3]
    options: dict[str, str] = dataclasses.field(default_factory=dict)  # of x264
    box: tuple[int, int, int, int] | None = None  # x, y, w, h inside the bars
    speed: float | None = None  # of the camera, widths a second


def photographs(paths: Sequence[Path] | None = None) -> list[np.ndarray]:
    """Return photographs, uint8 [h w 3]; by default those of scikit-image."""
    if paths is None:
        package = importlib.util.find_spec("skimage")  # its photographs alone are used
        assert package is not None and package.origin is not None
        paths = [Path(package.origin).parent / "data" / name for name in PHOTOGRAPHS]
    images = [cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) for path in paths]
    return [image for image in images if image is not None]


# --- scenes


def path_of(draw: Draw, speed: float, accelerate: float = 0.3) -> np.ndarray:
    """Return a smooth camera path [t 2] in pixels; speed: pixels a frame."""
    angle = draw.uniform(0, 2 * np.pi)
    times = np.arange(FRAMES)
    along = speed * times * (1 + accelerate * draw.uniform(-1, 1) * times / FRAMES)
    return along[:, None] * np.array([np.cos(angle), np.sin(angle)])


def view(photo: np.ndarray, shift: np.ndarray, zoom: float = 1.0, angle: float = 0.0) -> np.ndarray:
    """Return what a camera sees of a photograph that is continued by its mirror image."""
    height, width = photo.shape[:2]
    cosine = np.cos(angle) / zoom
    sine = np.sin(angle) / zoom
    turn = np.array([[cosine, -sine], [sine, cosine]])
    centre = np.array([width, height]) / 2 + shift
    corner = centre - turn @ (np.array([WIDTH, HEIGHT]) / 2)
    matrix = np.concatenate([turn, corner[:, None]], axis=1)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        photo, matrix, (WIDTH, HEIGHT), flags=flags, borderMode=cv2.BORDER_REFLECT_101
    )


def scene(
    draw: Draw,
    photos: Sequence[np.ndarray],
    path: np.ndarray,
    zoom: float = 1.0,
    turn: float = 0.0,
    objects: int = 1,
) -> np.ndarray:
    """Return frames of a photograph, with parts of others that move over it.

    path: [t 2], pixels. zoom: at the end. turn: radians at the end.
    """
    photo = photos[draw.integers(len(photos))]
    offset = draw.uniform(-60, 60, 2)
    moving = [_Object(draw, photos) for _ in range(objects)]
    frames = []
    for number, shift in enumerate(path):
        part = number / FRAMES
        frame = view(photo, offset + shift, zoom**part, turn * part)
        for each in moving:
            frame = each.draw_over(frame, number)
        frames.append(frame)
    return np.stack(frames)


class _Object:
    """An ellipse cut out of a photograph, on a straight path."""

    def __init__(self, draw: Draw, photos: Sequence[np.ndarray]) -> None:
        photo = photos[draw.integers(len(photos))]
        half = draw.integers(25, 50, 2)  # columns, rows
        seen = view(photo, draw.uniform(-60, 60, 2))
        rows, columns = np.mgrid[-half[1] - 2 : half[1] + 3, -half[0] - 2 : half[0] + 3]
        centre = HEIGHT // 2, WIDTH // 2
        self.patch = seen[rows + centre[0], columns + centre[1]]
        self.cover = np.clip((1 - np.hypot(columns / half[0], rows / half[1])) * 15, 0, 1)
        low = half + 10
        self.start = draw.uniform(low, np.array([WIDTH, HEIGHT]) - low) - half
        self.velocity = draw.uniform(-2, 2, 2)

    def draw_over(self, frame: np.ndarray, number: int) -> np.ndarray:
        place = self.start + self.velocity * number
        whole = np.floor(place).astype(int)
        matrix = np.array([[1, 0, place[0] - whole[0]], [0, 1, place[1] - whole[1]]])
        height, width = self.cover.shape
        patch, cover = (
            cv2.warpAffine(
                image,
                matrix,
                (width, height),
                flags=cv2.INTER_CUBIC,
                borderMode=cv2.BORDER_REPLICATE,
            )
            for image in (self.patch, self.cover)
        )
        top, left = np.maximum(whole[::-1], 0)
        bottom, right = np.minimum(np.add(whole[::-1], [height, width]), [HEIGHT, WIDTH])
        if top < bottom and left < right:
            own = slice(top - whole[1], bottom - whole[1]), slice(left - whole[0], right - whole[0])
            share = np.clip(cover[own], 0, 1)[..., None]
            under = frame[top:bottom, left:right]
            mixed = share * patch[own] + (1 - share) * under
            frame[top:bottom, left:right] = mixed.astype(np.uint8)
        return frame


def usual(draw: Draw, photos: Sequence[np.ndarray], **kwargs: float) -> np.ndarray:
    """Return a clean scene with a slowly moving camera."""
    path = path_of(draw, draw.uniform(0.3, 2.5))
    return scene(draw, photos, path, zoom=draw.uniform(0.95, 1.15), **kwargs)


def each(frames: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.stack([function(frame) for frame in frames])


# --- faults


def low_resolution(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    kernels = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4, cv2.INTER_NEAREST)
    kernel = kernels[number % 4]
    factor = draw.uniform(2.5, 4)
    small = (round(WIDTH / factor), round(HEIGHT / factor))

    def spoil(frame: np.ndarray) -> np.ndarray:
        reduced = cv2.resize(frame, small, interpolation=cv2.INTER_AREA)
        return cv2.resize(reduced, (WIDTH, HEIGHT), interpolation=kernel)

    return Planted("upscaled", ("low_resolution",), each(usual(draw, photos), spoil))


def encoded_before(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    frames = usual(draw, photos)
    if number % 3 == 2:
        options = {"crf": str(int(draw.integers(46, 52)))}
        return Planted("h264 before", ("compression",), decoded(encoded(frames, options)))
    if number % 3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(draw.integers(6, 15))]
        spoil = lambda frame: cv2.imdecode(cv2.imencode(".jpg", frame, quality)[1], 1)
        return Planted("jpeg before", ("compression",), each(frames, spoil))
    quantiser = int(draw.integers(18, 31))
    return Planted("mpeg4 before", ("compression",), _through_mpeg4(frames, quantiser))


def _through_mpeg4(frames: np.ndarray, quantiser: int) -> np.ndarray:
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as out:
        stream = out.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = quantiser
        stream.codec_context.bit_rate = 100_000
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    return decoded(file.getvalue())


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def own_quantiser(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    options = {"crf": str(int(draw.integers(38, 49)))}
    return Planted("quantiser", ("compression",), usual(draw, photos), options)


def bars(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    frames = usual(draw, photos)
    level = int(draw.integers(0, 24))
    if number % 2:
        side = int(draw.integers(20, 70))
        frames[:, :, :side] = level
        frames[:, :, -side:] = level
        return Planted("pillarbox", ("borders",), frames, box=(side, 0, WIDTH - 2 * side, HEIGHT))
    side = int(draw.integers(12, 36))
    frames[:, :side] = level
    frames[:, -side:] = level
    return Planted("letterbox", ("borders",), frames, box=(0, side, WIDTH, HEIGHT - 2 * side))


def blank(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    level = (2, 253, draw.uniform(20, 230))[number % 3]
    noise = draw.normal(level, draw.uniform(0, 1.5), (FRAMES, HEIGHT, WIDTH, 1))
    frames = np.repeat(np.clip(noise, 0, 255).astype(np.uint8), 3, axis=-1)
    return Planted("blank", ("blank", "static"), frames)


def frozen(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    frames = np.repeat(usual(draw, photos)[:1], FRAMES, axis=0)
    if number % 2:
        frames = _noisy(draw, frames, draw.uniform(1, 4))
    return Planted("frozen", ("static",), frames)


def shaking(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    path = path_of(draw, draw.uniform(0, 2)) + draw.normal(0, draw.uniform(1, 5), (FRAMES, 2))
    return Planted("shaking", ("shake",), scene(draw, photos, path))


def watermark(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    text = WORDS[number % len(WORDS)]
    scale = draw.uniform(0.5, 0.9)
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_DUPLEX, scale, 1)
    x = int(draw.choice([12, WIDTH - width - 12]))
    y = int(draw.choice([height + 12, HEIGHT - 14]))
    alpha = draw.uniform(0.45, 0.9)
    return Planted(
        "watermark", ("watermark",), _written(usual(draw, photos), text, (x, y), scale, alpha)
    )


def subtitle(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    text = LINES[number % len(LINES)]
    scale = draw.uniform(0.7, 0.9)
    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_DUPLEX, scale, 1)
    place = ((WIDTH - width) // 2, HEIGHT - int(draw.integers(16, 40)))
    return Planted("subtitle", ("text",), _written(usual(draw, photos), text, place, scale, 1.0))


def _written(
    frames: np.ndarray, text: str, place: tuple[int, int], scale: float, alpha: float
) -> np.ndarray:
    """Return frames with white text that has a dark outline."""

    def write(frame: np.ndarray) -> np.ndarray:
        over = frame.copy()
        for thickness, level in ((3, 20), (1, 255)):
            colour = (level,) * 3
            cv2.putText(
                over, text, place, cv2.FONT_HERSHEY_DUPLEX, scale, colour, thickness, cv2.LINE_AA
            )
        return cv2.addWeighted(over, alpha, frame, 1 - alpha, 0)

    return each(frames, write)


# --- controls


def _noisy(draw: Draw, frames: np.ndarray, sigma: float) -> np.ndarray:
    noise = draw.normal(0, sigma, frames.shape).astype(np.float32)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def pan(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    speed = float(np.exp(draw.uniform(np.log(0.3), np.log(10))))  # pixels a frame
    frames = scene(draw, photos, path_of(draw, speed, accelerate=0.0), objects=number % 2)
    return Planted("pan", (), frames, speed=speed * FPS / WIDTH)


def zoom(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    factor = (1.3, 0.8)[number % 2]
    return Planted("zoom", (), scene(draw, photos, path_of(draw, 0.2), zoom=factor, turn=0.05))


def noise(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    return Planted("noise", (), _noisy(draw, usual(draw, photos), draw.uniform(4, 10)))


def soft_focus(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    blurred = [cv2.GaussianBlur(photo, (0, 0), draw.uniform(2, 4)) for photo in photos]
    path = path_of(draw, draw.uniform(0.3, 2))
    frames = scene(draw, blurred, path, objects=0)
    near = [_Object(draw, photos) for _ in range(2)]  # in focus
    for number, frame in enumerate(frames):
        for one in near:
            frame = one.draw_over(frame, number)
        frames[number] = frame
    return Planted("soft focus", (), frames)


def low_texture(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    ramp = np.linspace(*np.sort(draw.uniform(60, 220, 2)), 300)
    sky = np.repeat(np.repeat(ramp[:, None, None], 500, axis=1), 3, axis=2).astype(np.uint8)
    path = path_of(draw, 0.5)
    frames = scene(draw, [sky], path, objects=0)
    one = _Object(draw, photos)
    moving = [one.draw_over(frame, number) for number, frame in enumerate(frames)]
    return Planted("low texture", (), np.stack(moving))


def strobe(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    gain = np.where(np.arange(FRAMES) // 2 % 2, 1.0, 0.5)
    frames = usual(draw, photos) * gain[:, None, None, None]
    return Planted("strobe", (), frames.astype(np.uint8))


def whip_pan(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    path = path_of(draw, draw.uniform(0.3, 1))
    burst = np.zeros(FRAMES)
    burst[14:19] = draw.uniform(15, 30)
    path[:, 0] += np.cumsum(burst)
    return Planted("whip pan", (), scene(draw, photos, path, objects=0))


def hand_held(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    times = np.arange(FRAMES) / FPS
    sway = [
        draw.uniform(2, 5) * np.sin(2 * np.pi * draw.uniform(0.5, 1.5) * times + draw.uniform(0, 6))
        for _ in range(2)
    ]
    path = path_of(draw, 0.5) + np.stack(sway, axis=1)
    return Planted("hand-held", (), scene(draw, photos, path))


def night(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    frames = usual(draw, photos) * draw.uniform(0.15, 0.3)
    return Planted("night", (), _noisy(draw, frames, 1.5))


def tripod(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    return Planted("tripod", (), scene(draw, photos, np.zeros((FRAMES, 2)), objects=1))


def repeated_frames(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    frames = usual(draw, photos)
    return Planted("12 frames a second", (), frames[np.arange(FRAMES) // 2 * 2])


def usual_encoding(draw: Draw, photos: Sequence[np.ndarray], number: int) -> Planted:
    options = {"crf": str(int(draw.integers(20, 29)))}
    return Planted("usual encoding", (), usual(draw, photos), options)


FAULTS = {
    low_resolution: 4,
    encoded_before: 3,
    own_quantiser: 2,
    bars: 4,
    blank: 3,
    frozen: 3,
    shaking: 3,
    watermark: 2,
    subtitle: 1,
}
CONTROLS = {
    pan: 4,
    zoom: 2,
    noise: 1,
    soft_focus: 2,
    low_texture: 1,
    strobe: 1,
    whip_pan: 1,
    hand_held: 2,
    night: 1,
    tripod: 2,
    repeated_frames: 1,
    usual_encoding: 2,
}


def corpus(
    seed: int, photos: Sequence[np.ndarray], rounds: int = 1, kinds: Sequence[str] = ()
) -> Iterator[Planted]:
    """Yield clips, one at a time. rounds: of each number above. kinds: names of functions."""
    makers = {**FAULTS, **CONTROLS}
    for order, (make, count) in enumerate(makers.items()):
        if kinds and make.__name__ not in kinds:
            continue
        for number in range(count * rounds):
            draw = np.random.default_rng([seed, order, number])
            yield make(draw, photos, number)


def encoded(frames: np.ndarray, options: dict[str, str]) -> bytes:
    """Return H.264 in mp4. options: of x264."""
    file = io.BytesIO()
    options = {**X264, "preset": "veryfast", "threads": "1", **options}
    with av.open(file, "w", format="mp4") as out:
        stream = add_stream(out, Fraction(FPS), HEIGHT, WIDTH, options)
        for number, frame in enumerate(frames):
            out.mux(stream.encode(yuv_frame(frame, number, Fraction(FPS))))
        out.mux(stream.encode(None))
    return file.getvalue()


def write(planted: Planted, path: Path) -> None:
    path.write_bytes(encoded(planted.frames, planted.options))
