"""Calibration of the step cache.

It finds the largest threshold whose clips stay near the exact ones. The result is a file in the
workdir. It holds for the weights and the sampling that it was found with, and for no others.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vdx.config.build import ConfigError, fill
from vdx.files import read_json_object, write_json
from vdx.generate.generator import Generator
from vdx.generate.video_io import to_uint8
from vdx.metrics.similarity import ssim
from vdx.models.adapters.lora import Adapted
from vdx.seeds import seed_words
from vdx.types import Params

FILE = "step_cache.json"
MIN_THRESHOLD = 3e-3  # below, no evaluation of the models tried is skipped
MAX_THRESHOLD = 3.0  # above, every evaluation is skipped that may be
BISECTIONS = 8  # in the logarithm: the result is within 3 % of the largest threshold
TIMED_CALLS = 3  # the median of three calls ignores one disturbance
# Fields of Sampling that a calibration does not depend on.
INDEPENDENT = ("cache_threshold", "batch")


@dataclasses.dataclass(frozen=True)
class CacheCalibration:
    """A threshold of the step cache, and the measurements that support it."""

    threshold: float  # of `Sampling.cache_threshold`; 0: none was good enough
    floor: float  # least SSIM to the exact clips that was required
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]  # one for each prompt
    ssim: tuple[float, ...]  # of each clip to the exact one
    evaluations: tuple[int, ...]  # made for each clip
    full: int  # evaluations of an exact clip
    seconds: Mapping[str, float]  # of one clip after compiling: "full", and "cached"
    num_frames: int
    fps: float
    weights: str  # their identity
    sampling: Mapping[str, Any]  # the fields of Sampling that a threshold depends on

    def save(self, workdir: Path) -> None:
        """Write the calibration into a workdir."""
        write_json(workdir / FILE, dataclasses.asdict(self))

    def summary(self) -> str:
        """Return the result as one line of text."""
        skipped = 1 - np.mean(self.evaluations) / self.full
        return (
            f"cache_threshold = {self.threshold:.4g}: SSIM {min(self.ssim):.4f} to "
            f"{max(self.ssim):.4f} (floor {self.floor}), {100 * skipped:.0f} % of "
            f"{self.full} evaluations skipped, {self.seconds['full']:.3f} s -> "
            f"{self.seconds['cached']:.3f} s a clip"
        )


def read_calibration(workdir: Path) -> CacheCalibration:
    """Return the calibration in a workdir. Raises ConfigError if there is none."""
    if not (workdir / FILE).is_file():
        raise ConfigError(
            f"{workdir} has no {FILE}: find a threshold first, "
            f"python -m vdx.sample --workdir={workdir} --calibrate_cache=0.95"
        )
    return fill(CacheCalibration, read_json_object(workdir / FILE), FILE)


def relevant_sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Sampling that a threshold depends on."""
    return {name: value for name, value in sampling.items() if name not in INDEPENDENT}


def check_calibration(
    calibration: CacheCalibration,
    weights: str,
    sampling: Mapping[str, Any],
    num_frames: int,
    fps: float,
    where: str,
) -> None:
    """Raise ConfigError if a calibration is of other weights or another clip."""
    # Both sides as JSON holds them: tuples are lists.
    wanted = _listed(
        relevant_sampling(sampling) | {"num_frames": num_frames, "fps": fps, "weights": weights}
    )
    found = _listed(
        dict(calibration.sampling)
        | {
            "num_frames": calibration.num_frames,
            "fps": calibration.fps,
            "weights": calibration.weights,
        }
    )

    # Every field that differs is named, with both values.
    other = [
        f"{name} = {wanted.get(name)!r}, not {found.get(name)!r}"
        for name in wanted | found
        if wanted.get(name) != found.get(name)
    ]

    if other:
        raise ConfigError(
            f"{where} was found for something else: {'; '.join(other)}. Calibrate "
            "again with --calibrate_cache and the same flags, or leave --step_cache away."
        )


def _listed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping whose tuples are lists, as they are after JSON."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in tree.items()
    }


class _Measurement(NamedTuple):
    """The clips of one threshold."""

    threshold: float
    ssim: list[float]  # of each clip to the exact one
    evaluations: list[int]  # made for each clip


@dataclasses.dataclass(frozen=True)
class _Clips:
    """Draws single clips, uint8 [t h w c].

    One compiled program serves all thresholds, and another one the exact clips.
    """

    generator: Generator
    params: Params | Adapted
    prompts: Sequence[str]
    seeds: Sequence[int]  # one for each prompt
    num_frames: int
    fps: float

    def exact(self, i: int) -> np.ndarray:
        """Draw clip i with every evaluation."""
        video = self.generator(
            self.params,
            [self.prompts[i]],
            [self.seeds[i]],
            num_frames=self.num_frames,
            fps=self.fps,
        )
        return to_uint8(video[0])

    def cached(self, i: int, threshold: float) -> tuple[np.ndarray, int]:
        """Draw clip i with the step cache; returns (clip, evaluations made)."""
        generator = self.generator
        rows = generator.batch_size(1)
        x0, evaluated = generator.from_seeds(
            self.params,
            generator.text_batch([self.prompts[i]] * rows, self.num_frames, self.fps),
            seed_words([self.seeds[i]] * rows),
            None,
            np.float32(threshold),
            (self.num_frames, *generator.frame_shape),
        )
        return to_uint8(x0[0]), int(np.sum(evaluated[:, 0]))


def calibrate(
    generator: Generator,
    params: Params | Adapted,
    prompts: Sequence[str],
    *,
    seed: int,
    num_frames: int,
    fps: float,
    floor: float,
    weights: str,
    log: Callable[[str], None] = print,
) -> CacheCalibration:
    """Find the largest threshold at which every clip has an SSIM of `floor`.

    The SSIM is to the clip of all evaluations; the threshold is 0 if there is none. Clip i has
    seed + i. Clips are drawn one by one: a clip is the same in any batch. Raises ConfigError for a
    floor that is no SSIM.
    """
    if not 0 < floor <= 1:
        raise ConfigError(f"--calibrate_cache={floor} is an SSIM, above 0 and at most 1.")

    # What the step cache is measured against.
    seeds = [seed + i for i in range(len(prompts))]
    clips = _Clips(generator, params, prompts, seeds, num_frames, fps)
    full = len(generator.step_table()["t"])
    exact = [clips.exact(i) for i in range(len(prompts))]

    # The exact clips are the result if no threshold is good enough.
    nothing = _Measurement(0.0, [1.0] * len(prompts), [full] * len(prompts))
    result = _bisect(clips, exact, floor, log) or nothing

    seconds_full = _median_seconds(lambda: clips.exact(0))
    seconds_cached = seconds_full
    if result.threshold:
        seconds_cached = _median_seconds(lambda: clips.cached(0, result.threshold))
    return CacheCalibration(
        threshold=result.threshold,
        floor=floor,
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        ssim=tuple(result.ssim),
        evaluations=tuple(result.evaluations),
        full=full,
        seconds={"full": seconds_full, "cached": seconds_cached},
        num_frames=num_frames,
        fps=fps,
        weights=weights,
        sampling=relevant_sampling(dataclasses.asdict(generator.sampling)),
    )


def _bisect(
    clips: _Clips, exact: Sequence[np.ndarray], floor: float, log: Callable[[str], None]
) -> _Measurement | None:
    """Return the measurement of the largest good threshold, or None."""
    best = None
    low = np.log(MIN_THRESHOLD)
    high = np.log(MAX_THRESHOLD)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        measured = _measure(clips, exact, float(np.exp(middle)), floor, log)
        if measured is None:
            high = middle
        else:
            low = middle
            best = measured
    return best


def _measure(
    clips: _Clips,
    exact: Sequence[np.ndarray],
    threshold: float,
    floor: float,
    log: Callable[[str], None],
) -> _Measurement | None:
    """Draw every clip at a threshold; returns None as soon as one is below the floor."""
    measured = _Measurement(threshold, [], [])
    for i, prompt in enumerate(clips.prompts):
        clip, evaluations = clips.cached(i, threshold)
        similarity = ssim(clip, exact[i])

        # One clip below the floor decides: the others are not drawn.
        if similarity < floor:
            log(
                f"cache_threshold = {threshold:.4g}: SSIM {similarity:.4f} is below the floor, "
                f"{prompt!r}"
            )
            return None
        measured.ssim.append(similarity)
        measured.evaluations.append(evaluations)

    full = len(clips.generator.step_table()["t"])
    log(
        f"cache_threshold = {threshold:.4g}: SSIM at least {min(measured.ssim):.4f}, "
        f"{np.mean(measured.evaluations):.1f} evaluations of {full}"
    )
    return measured


def _median_seconds(call: Callable[[], Any]) -> float:
    """Return the median time of a few calls."""
    times = []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
