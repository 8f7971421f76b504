"""Clips in memory and on disk, with the manifests that make them again."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vdx.config.build import ConfigError
from vdx.files import write_json
from vdx.generate.manifest import Weights, make_manifest
from vdx.generate.request import Request
from vdx.generate.video_io import check_finite, to_uint8, write_video

# The frames of a clip in pieces [t h w 3], uint8 or float32 in [-1, 1].
Pieces = Iterable[np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A generated clip."""

    frames: np.ndarray  # uint8 [t h w 3]
    fps: float  # frames per second
    prompt: str
    seed: int
    manifest: dict[str, Any]  # what made it; see vdx.generate.manifest

    def save(self, path: str | Path) -> None:
        """Write the clip as an mp4, and its manifest to the same name with .json.

        Of several processes only the first one writes. Raises ConfigError for another suffix.
        """
        path = Path(path)
        if path.suffix != ".mp4":
            raise ConfigError(f"{path} is not the name of an mp4: expected a name such as out.mp4.")
        if jax.process_index() == 0:
            write_video(path, self.frames, self.fps)
            write_json(path.with_suffix(".json"), self.manifest)


def join_pieces(pieces: Pieces) -> np.ndarray:
    """Return all pieces of a clip as one array [t h w 3]."""
    return np.concatenate(list(pieces))


def iter_uint8_frames(pieces: Pieces) -> Iterator[np.ndarray]:
    """Yield the frames of a clip, uint8 [h w 3]. Raises NotFinite."""
    for piece in pieces:
        if piece.dtype != np.uint8:
            check_finite(np.isfinite(piece))
            piece = to_uint8(piece)
        yield from piece


def write_clips(
    folder: Path,
    videos: Iterable[Iterable[np.ndarray]],
    fps: float,
    rows: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Write videos, each of frames uint8 [h w 3], as NNN.mp4.

    Returns the rows, each with the name of its file under "file".
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, (video, row) in enumerate(zip(videos, rows, strict=True)):
        name = f"{i:03d}.mp4"
        write_video(folder / name, video, fps)
        written.append({"file": name, **row})
    return written


def check_output(request: Request, out: Path) -> None:
    """Raise ConfigError for several clips that should go into one file."""
    if len(request.prompts) > 1 and out.suffix:
        raise ConfigError(f"{len(request.prompts)} prompts need a folder: --out={out.stem}")


def write_stream(
    clips: Iterable[Pieces], request: Request, weights: Weights | None, out: Path
) -> None:
    """Write clips while they are decoded; memory never holds a whole clip.

    One prompt: out.mp4 and out.json. Several: a folder of clips and its manifest.json.
    """
    digest = hashlib.sha256()  # of all frames, in the order of the prompts

    def hashed(pieces: Pieces) -> Iterator[np.ndarray]:
        for frame in iter_uint8_frames(pieces):
            digest.update(frame.tobytes())
            yield frame

    # Nothing is decoded before a writer reads its frames.
    videos = (hashed(pieces) for pieces in clips)
    if len(request.prompts) == 1 and out.suffix:
        write_video(out, next(videos), request.fps)
        path = out.with_suffix(".json")
        more = {}
    else:
        rows = [
            {"prompt": prompt, "seed": seed}
            for prompt, seed in zip(request.prompts, request.seeds, strict=True)
        ]
        path = out / "manifest.json"
        more = {"clips": write_clips(out, videos, request.fps, rows)}

    # Now the digest has read every frame.
    write_json(path, make_manifest(request, weights, digest.hexdigest(), **more))
