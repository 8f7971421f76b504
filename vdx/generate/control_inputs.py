"""What a request asks of its clips besides the words: files and numbers made entries of a batch."""

import functools
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vdx.config.build import ConfigError, lookup
from vdx.data.record import BadRecord, Record
from vdx.data.resize import resize
from vdx.data.signals import ACTIONS, Clip, read_signals
from vdx.data.track_files import TRACK_FILES
from vdx.data.video_files import video_record
from vdx.generate.image_inputs import open_picture

KNOWN = {"image": 0, "last_image": -1}  # frames that are given: the signal known_frames
NUMBERS = ("motion",)
TOLERANCE = 1e-3  # seconds


def file_digest(name: str, path: str) -> str:
    """SHA-256; raises ConfigError that names the flag."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"--{name}={path} cannot be read: {error.strerror}.") from error


def files(asked: Mapping[str, Any]) -> dict[str, str]:
    """{name: path} of what is asked by files."""
    return {
        name: value
        for name, value in asked.items()
        if name not in NUMBERS and not (name == "actions" and not str(value).endswith(".json"))
    }


def read_controls(
    asked: Mapping[str, Any],
    signals: Collection[str],
    shape: tuple[int, ...],
    fps: float,
    mean: float,
    flow_points: int,
    first_frame: bool = False,
) -> dict[str, np.ndarray]:
    """Entries of a batch of one clip of `shape` (t, h, w, c), from what is asked by name:

    image, last_image: pictures that the clip begins and ends with; reference: one of its subject;
    depth, pose, flow, camera: files as vdx.data.track_files says, with an entry for each frame, or
    videos; actions: such a file, or names with commas between them; motion: a number.
    signals: what the model reads. mean: what training subtracted from the pixels. flow_points: see
    ClipSampling. holds: see Generator. Raises ConfigError for what the model was not trained with,
    and what cannot be read.
    """
    for name in asked:
        signal = "known_frames" if name in KNOWN else name
        if signal not in signals and not (first_frame and name == "image"):
            raise ConfigError(
                f"--{name}: this model was not trained with the signal {signal!r}; "
                f"it reads: {', '.join(signals)}."
            )
    out: dict[str, np.ndarray] = {}
    if given := {name: asked[name] for name in KNOWN if name in asked}:
        known = _known_frames(given, shape, mean)
        out |= known if "known_frames" in signals else {"first_frame": known["known"][0]}
    if "motion" in asked:
        out["motion"] = np.asarray(asked["motion"], np.float32)
    tracks = {
        name: functools.partial(_read, name, asked[name])
        for name in asked
        if name not in (*KNOWN, *NUMBERS)
    }
    (t, h, w, _), key = shape, ", ".join(f"--{name}={asked[name]}" for name in tracks)
    times = np.arange(t) / fps
    record = Record(
        key, "", t / fps, times, lambda times: np.zeros((t, h, w, 3), np.uint8), tracks=tracks
    )
    clip = Clip(
        record, times, fps, record.read(times), (h, w), flow_points, np.random.default_rng(0)
    )
    try:
        out |= read_signals(tracks, clip)
    except (BadRecord, ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    return {name: np.asarray(value)[None] for name, value in out.items()}


def _known_frames(
    given: Mapping[str, str], shape: tuple[int, ...], mean: float
) -> dict[str, np.ndarray]:
    t, h, w, c = shape
    if c != 3:
        raise ConfigError(
            f"--{', --'.join(given)}: this model draws latents of {c} channels, and "
            "no encoder of pictures stands beside it."
        )
    known, mask = np.zeros(shape, np.float32), np.zeros(t, np.float32)
    for name, path in given.items():
        picture = resize(np.asarray(open_picture(name, path))[None], h, w)[0]
        known[KNOWN[name]] = picture.astype(np.float32) / 127.5 - 1.0 - mean
        mask[KNOWN[name]] = 1.0
    return {"known": known, "known_mask": mask}


def _read(name: str, value: Any, times: np.ndarray) -> np.ndarray:
    """A track from its file, which has an entry for each instant."""
    if name == "actions" and not str(value).endswith(".json"):
        rows = [
            lookup(word.strip(), dict(zip(ACTIONS, range(len(ACTIONS)), strict=True)), "--actions")
            for word in str(value).split(",")
        ]
        if len(rows) != len(times):
            raise ValueError(f"--actions names {len(rows)}; the clip has {len(times)} frames.")
        return np.array(rows, np.int32)

    def video() -> np.ndarray:
        record = video_record(str(value), "", lambda: str(value))
        step = times[1] - times[0] if len(times) > 1 else 0.0
        if record.duration + TOLERANCE < times[-1] + step:
            raise ValueError(
                f"--{name}={value} has {record.duration:.3g} s, and the clip "
                f"{times[-1] + step:.3g} s."
            )
        return record.read(times)

    try:
        return lookup(name, TRACK_FILES, "signals")(
            Path(value), np.arange(len(times)), len(times), video
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"--{name}={value}: {error}") from error
