"""Clips in memory and on disk, with the manifests that make them again."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vdx.config.build import ConfigError
from vdx.files import write_json
from vdx.generate.manifest import Weights, make_manifest
from vdx.generate.request import Request
from vdx.generate.video_io import (
    MAX_GIF_FPS,
    to_uint8,
    write_gif,
    write_video,
    write_webp,
)
from vdx.output_paths import check_output_file, check_output_folder

# Suffix of a file -> what writes a clip into it.
WRITERS: dict[str, Callable[[Path, Iterable[np.ndarray], float], None]] = {
    ".mp4": write_video,
    ".gif": write_gif,
    ".webp": write_webp,
}
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
        """Write the clip in a format of WRITERS, and its manifest next to it as .json.

        Of several processes only the first one writes. Raises ConfigError for another suffix.
        """
        path = Path(path)
        if path.suffix.lower() not in WRITERS:
            raise ConfigError(
                f"{path} is not the name of a clip: expected a name such as out.mp4, with one of "
                f"{', '.join(WRITERS)}."
            )
        if jax.process_index() == 0:
            write_clip(path, self.frames, self.fps)
            write_json(path.with_suffix(".json"), self.manifest)


def join_pieces(pieces: Pieces) -> np.ndarray:
    """Return all pieces of a clip as one array [t h w 3]."""
    return np.concatenate(list(pieces))


def iter_uint8_frames(pieces: Pieces) -> Iterator[np.ndarray]:
    """Yield the frames of a clip, uint8 [h w 3]. Raises NotFinite."""
    for piece in pieces:
        if piece.dtype != np.uint8:
            piece = to_uint8(piece)
        yield from piece


def write_clip(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write frames, uint8 [h w 3] each, in the format of the suffix, a row of WRITERS."""
    WRITERS[path.suffix.lower()](path, frames, fps)


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


def check_output(out: Path, count: int) -> None:
    """Raise ConfigError if clips and their manifest cannot be written to a path."""
    if not is_clip_file(out):
        check_output_folder(out, "out")
        return
    if count > 1:
        raise ConfigError(f"{count} prompts need a folder: --out={out.with_suffix('')}")
    check_output_file(out, "out", WRITERS)
    check_output_file(out.with_suffix(".json"), "out", (".json",))


def check_rate(out: Path, fps: float) -> None:
    """Raise ConfigError for more frames per second than the format of a path shows."""
    if is_clip_file(out) and out.suffix.lower() == ".gif" and fps > MAX_GIF_FPS:
        raise ConfigError(
            f"A GIF shows at most {MAX_GIF_FPS} frames per second, and the clip has {fps:g}: "
            f"--out={out.with_suffix('.mp4')}."
        )


def is_clip_file(out: Path) -> bool:
    """Return whether clips go into a file of this name, not into a folder."""
    return bool(out.suffix) and not (out.is_dir() and out.suffix.lower() not in WRITERS)


def write_stream(
    clips: Iterable[Pieces], request: Request, weights: Weights | None, out: Path
) -> None:
    """Write clips while they are decoded; an mp4 is never in memory as a whole.

    One prompt: a file of a suffix in WRITERS, and its .json. Several: a folder of clips and its
    manifest.json.
    """
    digest = hashlib.sha256()  # of all frames, in the order of the prompts

    def hashed(pieces: Pieces) -> Iterator[np.ndarray]:
        for frame in iter_uint8_frames(pieces):
            digest.update(frame.tobytes())
            yield frame

    # Nothing is decoded before a writer reads its frames.
    videos = (hashed(pieces) for pieces in clips)
    if is_clip_file(out):
        write_clip(out, next(videos), request.fps)
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
