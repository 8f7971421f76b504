"""How well clips follow a control signal, read from pixels.

Each number is given three times: of the model's clips; of true renders, which is the error of the
reader itself; and shuffled, of the same clips scored against the targets of other clips, which is
the value of a model that ignores the signal. Objects are read from clips of one object before a
background at rest; a pan is read from a background with a pattern.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vdx.config.build import lookup
from vdx.data.motion import motion_score
from vdx.metrics.control_readers import (
    background_pan,
    frame_flows,
    object_actions,
    object_angles,
    object_path,
    object_step,
    silhouette,
)
from vdx.metrics.prompt_following import read_attributes

__all__ = ["CONTROL_METRICS", "Metric", "control_scores", "psnr", "rank_correlation"]

Truth = Mapping[str, Any]  # what a clip should show: vdx.evaluation.scene_truth
Score = tuple[float, float]  # the value, and the share of clips (or frames) that could be read
Scorer = Callable[[Sequence[Any], Sequence[Truth]], Score]

BEST_PSNR = 99.0  # dB of equal frames, so that means stay finite
INSIDE = 0.51  # nearness of the main object, and of no other
READABLE = 0.8  # share of the clips that must be readable before a goal counts as reached
ROLLS = (1, 3, 5)  # places by which the targets are shuffled; the mean of three is steadier
GOAL_WIDTH = 32  # pixels of a frame's width for which goals in pixels are given


@dataclasses.dataclass(frozen=True)
class Metric:
    """One measure of how well a signal is followed."""

    signal: str  # its name in vdx.data.signals
    measure: str  # for people to read
    unit: str  # for people to read
    goal: float  # to be reached by a model; pixels are those of frames of 32 pixels
    higher: bool  # whether more is better
    read: Callable[[np.ndarray, float], Any]  # (video uint8 [t h w 3], fps) -> a reading
    score: Scorer  # (readings, truths) -> value, share that could be read


def control_scores(
    kind: str, videos: Sequence[np.ndarray], truths: Sequence[Truth], fps: float | Sequence[float]
) -> dict[str, Any]:
    """Score clips by one row of CONTROL_METRICS.

    videos: n clips uint8 [t h w 3]; truths: the target of each, and "video", its true render;
    fps: frames per second, of all or of each.
    Returns signal, measure, unit, higher (whether more is better), goal, and the value of "model",
    "true" renders and "shuffled" targets; "valid", the share of the model's clips that could be
    read; and "reached", whether the clips reach the goal, enough of them can be read, and the
    shuffled targets do not fit as well. Values that cannot be read are NaN.
    Raises ConfigError for an unknown kind and ValueError if clips and truths do not fit.
    """
    metric = lookup(kind, CONTROL_METRICS, "control metrics")
    _check(videos, truths)
    rates = [fps] * len(videos) if isinstance(fps, int | float) else list(fps)

    # The model, the reader's own error, and the value of a model that ignores the signal.
    readings = _read(metric, videos, rates)
    model, valid = metric.score(readings, truths)
    true, _ = metric.score(_read(metric, [truth["video"] for truth in truths], rates), truths)
    shuffled = _shuffled(metric, readings, truths)

    # A goal in pixels grows with the frame.
    goal = metric.goal
    if metric.unit == "px":
        goal *= videos[0].shape[2] / GOAL_WIDTH

    sign = 1 if metric.higher else -1
    better_than_shuffled = not sign * shuffled >= sign * model  # also where that is NaN
    reached = sign * model >= sign * goal and better_than_shuffled and valid >= READABLE
    return {
        "signal": metric.signal,
        "measure": metric.measure,
        "unit": metric.unit,
        "higher": metric.higher,
        "goal": goal,
        "model": model,
        "true": true,
        "shuffled": shuffled,
        "valid": valid,
        "reached": bool(reached),
    }


def _check(videos: Sequence[np.ndarray], truths: Sequence[Truth]) -> None:
    if len(videos) != len(truths) or not len(videos):
        raise ValueError(
            f"control_scores needs one truth for each clip, and at least one: got "
            f"{len(videos)} clips and {len(truths)} truths."
        )
    for i, (video, truth) in enumerate(zip(videos, truths, strict=True)):
        if video.dtype != np.uint8 or video.shape != truth["video"].shape:
            raise ValueError(
                f"Clip {i} is {video.dtype} {list(video.shape)}, its true render "
                f"uint8 {list(truth['video'].shape)}; they must have the same type and shape."
            )


def _read(metric: Metric, videos: Sequence[np.ndarray], rates: Sequence[float]) -> list[Any]:
    return [metric.read(video, fps) for video, fps in zip(videos, rates, strict=True)]


def _shuffled(metric: Metric, readings: Sequence[Any], truths: Sequence[Truth]) -> float:
    """Score readings against the targets of other clips; NaN for a single clip."""
    count = len(readings)
    values = []
    for places in ROLLS:
        if places < count:
            others = [truths[(i + places) % count] for i in range(count)]
            values.append(metric.score(readings, others)[0])
    return float(np.mean(values)) if values else math.nan


# Scores: (readings, truths) -> (value, share that could be read) ---------------------------------


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    """Compute the peak signal-to-noise ratio in dB of uint8 frames, 99 for equal ones."""
    error = float(((one.astype(np.float64) - two) ** 2).mean())
    if not error:
        return BEST_PSNR
    return min(10 * math.log10(255.0**2 / error), BEST_PSNR)


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Compute Spearman's rank correlation; equal values share their mean rank.

    Returns NaN for fewer than three values, or if all of one side are equal.
    """
    first = _centred_ranks(one)
    second = _centred_ranks(two)
    size = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    if len(one) < 3 or not size:
        return math.nan
    return float(first @ second) / size


def _centred_ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
    return ranks - ranks.mean()


def _mean(values: Sequence[float] | np.ndarray) -> Score:
    """Return the mean of the finite values, and their share."""
    found = np.asarray(values, float)
    finite = found[np.isfinite(found)]
    value = float(finite.mean()) if len(finite) else math.nan
    return value, len(finite) / max(len(found), 1)


def _mean_over_clips(measure: Callable[[Any, Truth], Any]) -> Scorer:
    """Return the scorer that averages measure(reading, truth) over all clips."""

    def scorer(readings: Sequence[Any], truths: Sequence[Truth]) -> Score:
        pairs = zip(readings, truths, strict=True)
        return _mean(
            np.concatenate([np.ravel(measure(reading, truth)) for reading, truth in pairs])
        )

    return scorer


def _distance(path: np.ndarray, truth: Truth) -> np.ndarray:
    """Measure [t] pixels between the object's centre and its target."""
    return np.linalg.norm(path - truth["centre"], axis=-1)


def _overlap(mask: np.ndarray, truth: Truth) -> np.ndarray:
    """Measure intersection over union [t] of silhouettes."""
    wanted = truth["depth"][..., 0] > INSIDE
    return (mask & wanted).sum((1, 2)) / np.maximum((mask | wanted).sum((1, 2)), 1)


def _angle_error(reading: np.ndarray, truth: Truth) -> np.ndarray:
    """Measure degrees [t] between angles, modulo the symmetry of the shape."""
    angle, period = reading.T
    error = np.abs(angle - truth["angle"]) % period
    return np.degrees(np.minimum(error, period - error))


def _end_point_error(flows: np.ndarray, truth: Truth) -> float:
    """Measure the median over frames of the mean flow error at hints on the object."""
    wanted = truth["flow"][:-1]
    there = (wanted[..., 2] > 0) & (truth["depth"][:-1, ..., 0] > INSIDE)
    error = np.linalg.norm(flows - wanted[..., :2], axis=-1)
    frames = [float(e[m].mean()) for e, m in zip(error, there, strict=True) if m.any()]
    return float(np.median(frames)) if frames else math.nan


def _motion_correlation(readings: Sequence[float], truths: Sequence[Truth]) -> Score:
    return rank_correlation(readings, [truth["motion"] for truth in truths]), 1.0


def _frame_rate_error(readings: Sequence[float], truths: Sequence[Truth]) -> Score:
    """Measure how far displacements leave the ratio of two frame rates, in octaves.

    Clips 0 and 1, 2 and 3, ... show the same at two rates: at the lower rate the object must go
    farther from frame to frame, in proportion. The value is the absolute mean over the pairs.
    """
    octaves = []
    for i in range(0, len(readings) - 1, 2):
        displacement = readings[i] / readings[i + 1]
        rate = truths[i]["fps"] / truths[i + 1]["fps"]
        octaves.append(math.log2(displacement * rate))
    value, valid = _mean(octaves)
    return abs(value), valid


def _frame_metric(signal: str, measure: str, place: int) -> Metric:
    """Return the measure of one frame that was given, by its PSNR."""
    return Metric(
        signal,
        measure,
        unit="dB",
        goal=30.0,
        higher=True,
        read=lambda video, fps: video[place],
        score=_mean_over_clips(lambda frame, truth: psnr(frame, truth["video"][place])),
    )


def _same_motion(reading: Mapping[str, str], truth: Truth) -> bool:
    return reading["motion"] == truth["words"]


def _same_subject(reading: Mapping[str, str], truth: Truth) -> bool:
    return reading["colour"] == truth["colour"] and reading["shape"] == truth["shape"]


def _pan_error(speed: float, truth: Truth) -> float:
    return abs(speed - truth["pan"])


def _same_actions(rows: np.ndarray, truth: Truth) -> np.ndarray:
    return rows == truth["actions"][:-1]


CONTROL_METRICS: dict[str, Metric] = {
    "first_frame": _frame_metric("first_frame", "first frame as given", 0),
    "first_frame_motion": Metric(
        signal="first_frame",
        measure="motion as the words say",
        unit="share",
        goal=0.9,
        higher=True,
        read=read_attributes,
        score=_mean_over_clips(_same_motion),
    ),
    "last_frame": _frame_metric("last_frame", "last frame as given", -1),
    "depth": Metric(
        signal="depth",
        measure="position error",
        unit="px",
        goal=1.0,
        higher=False,
        read=object_path,
        score=_mean_over_clips(_distance),
    ),
    "depth_overlap": Metric(
        signal="depth",
        measure="overlap of silhouettes",
        unit="share",
        goal=0.75,
        higher=True,
        read=silhouette,
        score=_mean_over_clips(_overlap),
    ),
    "pose": Metric(
        signal="pose",
        measure="position error",
        unit="px",
        goal=1.0,
        higher=False,
        read=object_path,
        score=_mean_over_clips(_distance),
    ),
    "pose_angle": Metric(
        signal="pose",
        measure="angle error",
        unit="degrees",
        goal=10.0,
        higher=False,
        read=object_angles,
        score=_mean_over_clips(_angle_error),
    ),
    "flow": Metric(
        signal="flow",
        measure="end-point error on the object",
        unit="px",
        goal=0.5,
        higher=False,
        read=frame_flows,
        score=_mean_over_clips(_end_point_error),
    ),
    "camera": Metric(
        signal="camera",
        measure="error of the pan",
        unit="widths/s",
        goal=0.03,
        higher=False,
        read=background_pan,
        score=_mean_over_clips(_pan_error),
    ),
    "actions": Metric(
        signal="actions",
        measure="frames that obey",
        unit="share",
        goal=0.8,
        higher=True,
        read=object_actions,
        score=_mean_over_clips(_same_actions),
    ),
    "motion": Metric(
        signal="motion",
        measure="rank correlation of motion scores",
        unit="",
        goal=0.7,
        higher=True,
        read=motion_score,
        score=_motion_correlation,
    ),
    "reference": Metric(
        signal="reference",
        measure="clips of that colour and shape",
        unit="share",
        goal=0.9,
        higher=True,
        read=read_attributes,
        score=_mean_over_clips(_same_subject),
    ),
    "fps": Metric(
        signal="fps",
        measure="mean error of displacement / frame",
        unit="octaves",
        goal=0.26,
        higher=False,
        read=object_step,
        score=_frame_rate_error,
    ),
}
