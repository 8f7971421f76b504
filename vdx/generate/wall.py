"""The wall: the same prompts and seeds drawn again and again while a model learns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vdx.files import write_json
from vdx.generate.pipeline import Generator
from vdx.generate.video_io import to_uint8, write_video
from vdx.types import Params


def write_clips(folder: Path, videos: np.ndarray, fps: float,
                rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Writes uint8 videos [n t h w 3] as NNN.mp4; gives back the rows with their "file"."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for i, (video, row) in enumerate(zip(videos, rows, strict=True)):
        write_video(folder / f"{i:03d}.mp4", video, fps)
        out.append({"file": f"{i:03d}.mp4", **row})
    return out


def draw_wall(generator: Generator, params: Params, prompts: Sequence[str], folder: Path, *,
              num_frames: int, fps: float) -> None:
    """Clip i of the wall has prompt i and seed i. Every process draws, the first one writes."""
    seeds = list(range(len(prompts)))
    videos = to_uint8(generator(params, prompts, seeds, num_frames=num_frames, fps=fps))
    if jax.process_index() == 0:
        rows = [{"prompt": p, "seed": s} for p, s in zip(prompts, seeds, strict=True)]
        write_json(folder / "samples.json", write_clips(folder, videos, fps, rows))
