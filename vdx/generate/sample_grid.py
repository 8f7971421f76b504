"""The wall: the same prompts and seeds drawn again while a model learns. And contact sheets."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from vdx.files import write_json
from vdx.generate.generator import Generator
from vdx.generate.video_io import to_uint8, write_video, write_webp
from vdx.types import Params


def write_clips(
    folder: Path,
    videos: Iterable[Iterable[np.ndarray]],
    fps: float,
    rows: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Writes videos, each of frames uint8 [h w 3], as NNN.mp4; gives back the rows with their
    "file"."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for i, (video, row) in enumerate(zip(videos, rows, strict=True)):
        write_video(folder / f"{i:03d}.mp4", video, fps)
        out.append({"file": f"{i:03d}.mp4", **row})
    return out


def write_sheet(
    path: Path,
    videos: np.ndarray,
    prompts: Sequence[str],
    fps: float,
    columns: int = 6,
    side: int = 128,
) -> None:
    """Writes uint8 videos [n t h w 3] as one moving picture (WebP), each above its prompt."""

    def tile(video, prompt) -> np.ndarray:
        text = "\n".join(textwrap.wrap(prompt, 25, max_lines=2, placeholder="..."))
        tiles = []
        for frame in video:
            image = Image.new("RGB", (side + 32, side + 32), (250, 250, 250))
            image.paste(
                Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST), (16, 2)
            )
            ImageDraw.Draw(image).multiline_text(
                (side // 2 + 16, side + 4),
                text,
                (40, 40, 40),
                font_size=11,
                anchor="ma",
                align="center",
            )
            tiles.append(np.asarray(image))
        return np.stack(tiles)

    tiles = [tile(v, p) for v, p in zip(videos, prompts, strict=True)]
    tiles += [np.full_like(tiles[0], 250)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], 2) for i in range(0, len(tiles), columns)]
    write_webp(path, np.concatenate(rows, 1), fps)


def draw_sample_grid(
    generator: Generator,
    params: Params,
    prompts: Sequence[str],
    folder: Path,
    *,
    num_frames: int,
    fps: float,
) -> None:
    """Clip i of the wall has prompt i and seed i. Every process draws, the first one writes the
    clips and all of them as one picture, `sample_grid.webp`."""
    seeds = list(range(len(prompts)))
    videos = to_uint8(generator(params, prompts, seeds, num_frames=num_frames, fps=fps))
    if jax.process_index() == 0:
        rows = [{"prompt": p, "seed": s} for p, s in zip(prompts, seeds, strict=True)]
        write_sheet(folder / "sample_grid.webp", videos, prompts, fps, columns=4)
        write_json(folder / "samples.json", write_clips(folder, videos, fps, rows))
