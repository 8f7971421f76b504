"""Does a clip go where it is steered? One number for each way to steer, read from pixels.

Each number is given three times: of the model's clips, of true renders (what the reader itself
gets wrong), and of the control: the same clips against what other clips were asked for, which is
what they would get if they did not listen. What concerns an object is read from clips of one
object before a background at rest; a pan is read from a background with a pattern.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vdx.config.build import lookup
from vdx.data.motion import motion_score
from vdx.data.scenes.signals import depth, flow
from vdx.data.scenes.world import CAMERAS, COMMAND_SPEED, SPEEDS, VELOCITIES, Scene
from vdx.data.signals import sparse_flow_hints
from vdx.metrics.optical_flow import lucas_kanade, pan_speed
from vdx.metrics.prompt_following import read_angles, read_attributes, track_object

__all__ = ["CONTROL_METRICS", "Metric", "control_scores", "psnr", "rank_correlation", "scene_truth"]

Truth = Mapping[str, Any]
Score = tuple[float, float]  # the value, and the share of clips (or frames) that could be read
Scorer = Callable[[Sequence[Any], Sequence[Truth]], Score]

BEST_PSNR = 99.0  # of equal pictures, so that means stay finite
DARK = 92  # levels; backgrounds are darker in every channel
COLOURED = 0.42  # of the object's colour in a pixel: it is the object's, even if only its fill
INSIDE = 0.51  # nearness of the main object, and of no other
LEAST_STEP = 0.1  # pixels a frame, below which a ratio of speeds is noise
READ = 0.8  # of the clips must be readable before a goal counts as reached
ROLLS = (1, 3, 5)  # by how many places the control shifts what was asked


@dataclasses.dataclass(frozen=True)
class Metric:
    """One way to measure how a signal is obeyed.

    signal: what is measured, as `vdx.data.signals` calls it; measure, unit: for people to read;
    goal: what a model should reach, in pixels for frames of 32 pixels; higher: whether more is
    better. read(video uint8 [t h w 3], fps) gives what is seen, score(readings, truths) the value.
    """

    signal: str
    measure: str
    unit: str
    goal: float
    higher: bool
    read: Callable[[np.ndarray, float], Any]
    score: Scorer


def scene_truth(scene: Scene, times: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """What a clip of a scene with these frames should show, as `steering_scores` takes it."""
    times = np.asarray(times, np.float64)
    state, video = scene.state(times)[0], scene.render(times, height, width)
    fps = 1.0 / float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    return {
        "video": video,
        "centre": state["center"] * (width, height),
        "angle": state["angle"],
        "depth": depth(scene, times, height, width),
        "pan": CAMERAS[scene.camera],
        "fps": fps,
        "flow": sparse_flow_hints(flow(scene, times, height, width), 0, np.random.default_rng(0)),
        "actions": scene.objects[0].actions(times),
        "motion": motion_score(video, fps),
        "words": scene.objects[0].motion,
        "colour": scene.objects[0].colour,
        "shape": scene.objects[0].shape,
    }


def control_scores(
    kind: str, videos: Sequence[np.ndarray], truths: Sequence[Truth], fps: float | Sequence[float]
) -> dict[str, Any]:
    """A line of the report about one row of STEERING.

    videos: n clips uint8 [t h w 3]; truths: for each what it was asked for, and "video", the true
    render; fps: frames per second, of all or of each.
    Gives signal, measure, unit, higher (whether more is better), goal, and the value of "model",
    "true" renders and the "control"; "valid", the share of the model's clips that could be read;
    and whether the goal is "reached": by clips of which enough can be read, not by the control.
    Values that cannot be read are NaN. Raises ConfigError for an unknown kind and ValueError if
    the numbers of clips and truths differ or there are none.
    """
    metric = lookup(kind, CONTROL_METRICS, "steering")
    if len(videos) != len(truths) or not len(videos):
        raise ValueError(
            f"steering_scores needs one truth for each clip, and at least one: got "
            f"{len(videos)} clips and {len(truths)} truths."
        )
    for i, (video, truth) in enumerate(zip(videos, truths, strict=True)):
        if video.dtype != np.uint8 or video.shape != truth["video"].shape:
            raise ValueError(
                f"Clip {i} is {video.dtype} {list(video.shape)}, its true render "
                f"uint8 {list(truth['video'].shape)}; they must be alike."
            )
    rates = [fps] * len(videos) if isinstance(fps, int | float) else list(fps)
    read = lambda clips: [metric.read(v, r) for v, r in zip(clips, rates, strict=True)]
    readings, count = read(videos), len(videos)
    model, valid = metric.score(readings, truths)
    true, _ = metric.score(read([t["video"] for t in truths]), truths)
    others = [
        metric.score(readings, [truths[(i + by) % count] for i in range(count)])[0]
        for by in ROLLS
        if by < count
    ]
    control = float(np.mean(others)) if others else math.nan
    goal = metric.goal * (videos[0].shape[2] / 32 if metric.unit == "px" else 1)
    sign = 1 if metric.higher else -1
    reached = sign * model >= sign * goal and not sign * control >= sign * model and valid >= READ
    return {
        "signal": metric.signal,
        "measure": metric.measure,
        "unit": metric.unit,
        "higher": metric.higher,
        "goal": goal,
        "model": model,
        "true": true,
        "control": control,
        "valid": valid,
        "reached": bool(reached),
    }


# Readers: (video, fps) -> what is seen ----------------------------------------------------------


def _path(video: np.ndarray, fps: float) -> np.ndarray:
    """[t 2] pixels: the object's centre, NaN in frames that do not show it."""
    track, path = track_object(video), np.full((len(video), 2), np.nan)
    if track is not None:
        path[track.seen] = track.centre[track.seen]
    return path


def _silhouette(video: np.ndarray, fps: float) -> np.ndarray:
    """bool [t h w]"""
    track = track_object(video)
    return np.zeros(video.shape[:3], bool) if track is None else track.amount > COLOURED


def _angles(video: np.ndarray, fps: float) -> np.ndarray:
    """[t 2]: the angle, and the period in which the shape looks the same; NaN if not seen."""
    track, found = track_object(video), np.full((len(video), 2), np.nan)
    if track is not None and len(track.seen) >= len(video) / 2:
        angles, period = read_angles(track)
        found[track.seen] = np.stack([angles, np.full(len(angles), period or np.nan)], -1)
    return found


def _flows(video: np.ndarray, fps: float) -> np.ndarray:
    """[t-1 h w 2]"""
    return np.stack([lucas_kanade(one, two) for one, two in itertools.pairwise(video)])


def _pan(video: np.ndarray, fps: float) -> float:
    """Widths per second by which the background goes right, objects and their edges left out."""
    bright = np.pad(video.max(-1) > DARK, ((0, 0), (2, 2), (2, 2)))
    height, width = video.shape[1:3]
    near = np.any([bright[:, y : y + height, x : x + width] for y in range(5) for x in range(5)], 0)
    return pan_speed(video, fps, ~near)


def _moves(video: np.ndarray, fps: float) -> np.ndarray:
    """int [t-1], rows of ACTIONS: which way the object goes, -1 where it is not seen."""
    height, width = video.shape[1:3]
    step = np.diff(_path(video, fps) / (width, height), axis=0) * fps
    ways = np.array(list(VELOCITIES.values()), float)
    far = step @ ways.T  # the rows of ACTIONS after "stay"
    rows = np.where(
        np.abs(step).max(-1) < 0.5 * COMMAND_SPEED * SPEEDS["slow"], 0, 1 + far.argmax(-1)
    )
    return np.where(np.isfinite(step).all(-1), rows, -1)


def _step(video: np.ndarray, fps: float) -> float:
    """Pixels a frame that the object goes in a straight line; NaN if it hardly does."""
    path = _path(video, fps)
    seen = np.flatnonzero(np.isfinite(path).all(-1))
    if len(seen) < 3:
        return math.nan
    far = float(np.linalg.norm(np.polyfit(seen, path[seen], 1)[:1]))
    return far if far >= LEAST_STEP else math.nan


# Scores: (readings, truths) -> (value, share that could be read) ---------------------------------


def _mean(values: Sequence[float] | np.ndarray) -> Score:
    found = np.asarray(values, float)
    fine = found[np.isfinite(found)]
    return (float(fine.mean()) if len(fine) else math.nan), len(fine) / max(len(found), 1)


def _each(measure: Callable[[Any, Truth], Any]) -> Scorer:
    """The mean of measure(reading, truth), a number or several, over all clips."""
    return lambda readings, truths: _mean(
        np.concatenate([np.ravel(measure(r, t)) for r, t in zip(readings, truths, strict=True)])
    )


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures uint8, 99 for equal ones."""
    error = float(((one.astype(np.float64) - two) ** 2).mean())
    return min(10 * math.log10(255.0**2 / error), BEST_PSNR) if error else BEST_PSNR


def _distance(path: np.ndarray, truth: Truth) -> np.ndarray:
    return np.linalg.norm(path - truth["centre"], axis=-1)


def _overlap(mask: np.ndarray, truth: Truth) -> np.ndarray:
    asked = truth["depth"][..., 0] > INSIDE
    return (mask & asked).sum((1, 2)) / np.maximum((mask | asked).sum((1, 2)), 1)


def _turn(read: np.ndarray, truth: Truth) -> np.ndarray:
    angle, period = read.T
    off = np.abs(angle - truth["angle"]) % period
    return np.degrees(np.minimum(off, period - off))


def _end_point(flows: np.ndarray, truth: Truth) -> float:
    """Median over the frames of the mean error where flow is asked for, on the object."""
    asked = truth["flow"][:-1]
    there = (asked[..., 2] > 0) & (truth["depth"][:-1, ..., 0] > INSIDE)
    error = np.linalg.norm(flows - asked[..., :2], axis=-1)
    frames = [float(e[m].mean()) for e, m in zip(error, there, strict=True) if m.any()]
    return float(np.median(frames)) if frames else math.nan


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Spearman's; equal values share their mean rank. NaN of fewer than three, or all equal."""
    ranks = []
    for values in (one, two):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
        ranks.append(rank - rank.mean())
    size = math.prod(float(np.linalg.norm(rank)) for rank in ranks)
    return float(ranks[0] @ ranks[1]) / size if len(one) > 2 and size else math.nan


def _strength(readings: Sequence[float], truths: Sequence[Truth]) -> Score:
    return rank_correlation(readings, [t["motion"] for t in truths]), 1.0


def _rates(readings: Sequence[float], truths: Sequence[Truth]) -> Score:
    """Clips 0 and 1, 2 and 3, ... show the same at two rates: the object must go farther from
    frame to frame at the lower rate, in proportion. How far the mean of that proportion is off, by
    its log2."""
    off = [
        math.log2(readings[i] / readings[i + 1] * truths[i]["fps"] / truths[i + 1]["fps"])
        for i in range(0, len(readings) - 1, 2)
    ]
    value, valid = _mean(off)
    return abs(value), valid


def _still_picture(place: int) -> dict[str, Any]:
    return {
        "read": lambda video, fps: video[place],
        "score": _each(lambda picture, truth: psnr(picture, truth["video"][place])),
    }


CONTROL_METRICS: dict[str, Metric] = {
    "first_frame": Metric(
        "first_frame", "first frame as given", "dB", 30.0, True, **_still_picture(0)
    ),
    "first_frame_motion": Metric(
        "first_frame",
        "motion as the words say",
        "share",
        0.9,
        True,
        read_attributes,
        _each(lambda read, truth: read["motion"] == truth["words"]),
    ),
    "last_frame": Metric(
        "last_frame", "last frame as given", "dB", 30.0, True, **_still_picture(-1)
    ),
    "depth": Metric("depth", "position error", "px", 1.0, False, _path, _each(_distance)),
    "depth_overlap": Metric(
        "depth", "overlap of silhouettes", "share", 0.75, True, _silhouette, _each(_overlap)
    ),
    "pose": Metric("pose", "position error", "px", 1.0, False, _path, _each(_distance)),
    "pose_angle": Metric("pose", "angle error", "degrees", 10.0, False, _angles, _each(_turn)),
    "flow": Metric(
        "flow", "end-point error on the object", "px", 0.5, False, _flows, _each(_end_point)
    ),
    "camera": Metric(
        "camera",
        "error of the pan",
        "widths/s",
        0.03,
        False,
        _pan,
        _each(lambda speed, truth: abs(speed - truth["pan"])),
    ),
    "actions": Metric(
        "actions",
        "frames that obey",
        "share",
        0.8,
        True,
        _moves,
        _each(lambda rows, truth: rows == truth["actions"][:-1]),
    ),
    "motion": Metric(
        "motion", "rank correlation of motion scores", "", 0.7, True, motion_score, _strength
    ),
    "reference": Metric(
        "reference",
        "clips of that colour and shape",
        "share",
        0.9,
        True,
        read_attributes,
        _each(lambda read, truth: all(read[k] == truth[k] for k in ("colour", "shape"))),
    ),
    "fps": Metric(
        "fps", "mean error of displacement / frame", "octaves", 0.26, False, _step, _rates
    ),
}
