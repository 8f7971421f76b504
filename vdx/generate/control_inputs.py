"""Controls of a request to a trained model, read from files and numbers."""

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vdx.config.build import ConfigError, lookup
from vdx.data.record import NEAR, BadRecord, Record, clip_times
from vdx.data.resize import resize
from vdx.data.signals import ACTIONS, Clip, read_signals
from vdx.data.track_files import TRACK_FILES
from vdx.data.video_files import video_record
from vdx.generate.image_inputs import open_image

KNOWN = {"image": 0, "last_image": -1}  # the frame that each gives: the signal known_frames
NUMBERS = ("motion",)
TRACKS = ("reference", "depth", "pose", "flow", "camera", "actions")
CONTROLS = (*KNOWN, *TRACKS, *NUMBERS)
TOLERANCE = 1e-3  # seconds by which a video may be shorter than the clip: rounded timestamps


def read_controls(
    controls: Mapping[str, Any],
    signals: Collection[str],
    shape: tuple[int, ...],
    fps: float,
    mean: float,
    flow_points: int,
    first_frame: bool = False,
) -> dict[str, np.ndarray]:
    """Return the batch entries [1 ...] of controls for a clip of `shape` [t h w c].

    image, last_image: files of images that the clip begins and ends with. reference: an image
    of its subject. depth, pose, flow, camera: files as vdx.data.track_files says, with an entry
    for each frame, or videos. actions: such a file, or names with commas between them. motion: a
    number.

    signals: the names that the model reads. mean: of the training pixels, which training
    subtracts. flow_points: see ClipSampling. first_frame: see Generator. Raises ConfigError for
    signals that the model was not trained with, and for files that cannot be read.
    """
    _check_signals(controls, signals, first_frame)

    # Images of known frames, and numbers.
    entries: dict[str, np.ndarray] = {}
    images = {name: controls[name] for name in KNOWN if name in controls}
    if images:
        known = _known_frames(images, shape, mean)
        entries |= known if "known_frames" in signals else {"first_frame": known["known"][0]}
    if "motion" in controls:
        entries["motion"] = np.asarray(controls["motion"], np.float32)

    # Files of tracks, through the functions that read them in training.
    tracks = {
        name: functools.partial(_read_track, name, value, fps)
        for name, value in controls.items()
        if name not in (*KNOWN, *NUMBERS)
    }
    try:
        entries |= read_signals(tracks, _dummy_clip(controls, tracks, shape, fps, flow_points))
    except (BadRecord, ValueError, OSError) as error:
        raise ConfigError(str(error)) from error

    # [...] -> [1 ...]
    return {name: np.asarray(value)[None] for name, value in entries.items()}


def _check_signals(
    controls: Mapping[str, Any], signals: Collection[str], first_frame: bool
) -> None:
    """Raise ConfigError for a control whose signal the model was not trained with."""
    for name in controls:
        signal = "known_frames" if name in KNOWN else name
        if signal not in signals and not (first_frame and name == "image"):
            raise ConfigError(
                f"--{name}: this model was not trained with the signal {signal!r}; "
                f"it reads: {', '.join(signals)}."
            )


def _dummy_clip(
    controls: Mapping[str, Any],
    tracks: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    shape: tuple[int, ...],
    fps: float,
    flow_points: int,
) -> Clip:
    """Return a black clip with the given tracks, as the readers of signals take it."""
    t, h, w, _ = shape
    times = np.arange(t) / fps
    key = ", ".join(f"--{name}={controls[name]}" for name in tracks)

    def read(times: np.ndarray) -> np.ndarray:
        return np.zeros((t, h, w, 3), np.uint8)

    record = Record(key, "", t / fps, times, read, tracks=tracks)
    rng = np.random.default_rng(0)  # of the points of a sparse flow
    return Clip(record, times, fps, record.read(times), (h, w), flow_points, rng)


def _known_frames(
    images: Mapping[str, str], shape: tuple[int, ...], mean: float
) -> dict[str, np.ndarray]:
    """Return `known` [t h w c], black but for the given frames, and `known_mask` [t]."""
    t, h, w, c = shape
    if c != 3:
        raise ConfigError(
            f"--{', --'.join(images)}: this model draws latents of {c} channels, and "
            "it has no encoder of images."
        )
    known = np.zeros(shape, np.float32)
    mask = np.zeros(t, np.float32)
    for name, path in images.items():
        pixels = resize(np.asarray(open_image(name, path))[None], h, w)[0]
        known[KNOWN[name]] = pixels.astype(np.float32) / 127.5 - 1.0 - mean
        mask[KNOWN[name]] = 1.0
    return {"known": known, "known_mask": mask}


def _read_track(name: str, value: Any, fps: float, times: np.ndarray) -> np.ndarray:
    """Return the entries of a track at `times` [t]; its file has one for each."""
    if name == "actions" and not str(value).endswith(".json"):
        return _parse_actions(str(value), len(times))

    def video() -> np.ndarray:
        return _read_video(name, str(value), fps, len(times))

    try:
        read = lookup(name, TRACK_FILES, "signals")
        return read(Path(value), np.arange(len(times)), len(times), video)
    except (ValueError, OSError) as error:
        raise ValueError(f"--{name}={value}: {error}") from error


def _parse_actions(names: str, frames: int) -> np.ndarray:
    """Return int32 [t] for names with commas between them."""
    numbers = {action: number for number, action in enumerate(ACTIONS)}
    actions = [lookup(name.strip(), numbers, "--actions") for name in names.split(",")]
    if len(actions) != frames:
        raise ValueError(f"--actions names {len(actions)}; the clip has {frames} frames.")
    return np.array(actions, np.int32)


def _read_video(name: str, path: str, fps: float, num_frames: int) -> np.ndarray:
    """Return the frames of a video for a clip from its start, uint8 [t h w 3]."""
    record = video_record(path, "", lambda: path)
    seconds = num_frames / fps
    if record.duration * (1 + NEAR) + TOLERANCE < seconds:
        raise ValueError(
            f"--{name}={path} has {record.duration:.3g} s, and the clip {seconds:.3g} s."
        )
    return record.read(clip_times(record, fps, num_frames))
