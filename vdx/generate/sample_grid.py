"""Sample grids: the same prompts and seeds drawn again while a model learns."""

import logging
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

from vdx.files import write_json
from vdx.generate.clip import Clip, write_clips
from vdx.generate.video_io import NotFinite, write_webp

BORDER = 16  # pixels left and right of a tile
TOP = 2  # pixels above it
TEXT_LINE = 25  # characters of a prompt on one line; two lines fit below a tile
PAPER = 250  # grey level around the tiles


def write_sheet(
    path: Path,
    videos: np.ndarray,
    prompts: Sequence[str],
    fps: float,
    columns: int = 6,
    side: int = 128,
) -> None:
    """Write uint8 videos [n t h w 3] as one animated WebP, each above its prompt.

    side: pixels of each video in the sheet.
    """
    tiles = [_tile(video, prompt, side) for video, prompt in zip(videos, prompts, strict=True)]
    blank = np.full_like(tiles[0], PAPER)
    tiles += [blank] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], 2) for i in range(0, len(tiles), columns)]
    write_webp(path, np.concatenate(rows, 1), fps)


def _tile(video: np.ndarray, prompt: str, side: int) -> np.ndarray:
    """Return a video [t h w 3] above its prompt, uint8 [t side+32 side+32 3]."""
    text = "\n".join(textwrap.wrap(prompt, TEXT_LINE, max_lines=2, placeholder="..."))
    frames = []
    height, width = video.shape[1:3]
    scale = side / max(height, width)
    width, height = round(width * scale), round(height * scale)
    # Small pixels stay sharp; large frames are averaged.
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    for frame in video:
        size = side + 2 * BORDER
        image = Image.new("RGB", (size, size), (PAPER, PAPER, PAPER))
        pixels = Image.fromarray(frame).resize((width, height), resampling)
        image.paste(pixels, (BORDER + (side - width) // 2, TOP + side - height))
        ImageDraw.Draw(image).multiline_text(
            (size // 2, side + 4),
            text,
            (40, 40, 40),
            font_size=11,
            anchor="ma",
            align="center",
        )
        frames.append(np.asarray(image))
    return np.stack(frames)


def draw_sample_grid(draw: Callable[[], Sequence[Clip]], folder: Path) -> None:
    """Draw the clips of the grid and write all of them.

    draw: gives clip i of prompt i and seed i. Every process draws. The first one writes the clips,
    `samples.json`, and all clips as one animation, `sample_grid.webp`. Clips that are not finite
    are reported and not written: the training that draws them continues.
    """
    try:
        clips = draw()
    except NotFinite as error:
        logging.warning("No samples in %s: %s", folder, error)
        return
    if jax.process_index() == 0:
        videos = np.stack([clip.frames for clip in clips])
        fps = clips[0].fps
        prompts = [clip.prompt for clip in clips]
        write_sheet(folder / "sample_grid.webp", videos, prompts, fps, columns=4)
        rows = [{"prompt": clip.prompt, "seed": clip.seed} for clip in clips]
        written = write_clips(folder, [clip.frames for clip in clips], fps, rows)
        write_json(folder / "samples.json", written)
