"""How much may be reused: the largest threshold whose clips stay near those of all evaluations.

What was found, and the proof, is a file in the workdir that holds for the weights and the
sampling that it was found with, and no others.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vdx.config.build import ConfigError, fill
from vdx.files import read_json, write_json
from vdx.generate.generator import Generator
from vdx.generate.video_io import to_uint8
from vdx.metrics.similarity import ssim
from vdx.types import Params

FILE = "step_cache.json"
LEAST, MOST, HALVINGS = 3e-3, 3.0, 8  # thresholds between which is searched, in ratios
TIMED = 3
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class CacheCalibration:
    """threshold: of `Sampling.reuse`. floor: the least SSIM to the clip of all evaluations that
    was asked for, ssim: what was found, one for each of the prompts and seeds. evaluations: how
    many asked the network, of `full` ones. seconds: for one clip with and without reuse, after
    compiling. weights: their identity. sampling: the other fields of Sampling."""

    threshold: float
    floor: float
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    ssim: tuple[float, ...]
    step_table: tuple[int, ...]
    full: int
    seconds: Mapping[str, float]
    num_frames: int
    fps: float
    weights: str
    sampling: Mapping[str, Any]

    def save(self, workdir: Path) -> None:
        write_json(workdir / FILE, dataclasses.asdict(self))

    def said(self) -> str:
        skipped = 1 - np.mean(self.step_table) / self.full
        return (
            f"cache_threshold = {self.threshold:.4g}: SSIM {min(self.ssim):.4f} to "
            f"{max(self.ssim):.4f} (floor {self.floor}), {100 * skipped:.0f} % of "
            f"{self.full} evaluations skipped, {self.seconds['full']:.3f} s -> "
            f"{self.seconds['reused']:.3f} s a clip"
        )


def read_calibration(workdir: Path) -> CacheCalibration:
    """Raises ConfigError if there is none."""
    if not (workdir / FILE).is_file():
        raise ConfigError(
            f"{workdir} has no {FILE}: find a threshold first, "
            f"python -m vdx.sample --workdir={workdir} --calibrate_cache=0.95"
        )
    return fill(CacheCalibration, read_json(workdir / FILE), FILE)


def what_matters(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a proof holds for: others may be drawn at once, and the threshold is what
    it says."""
    return {k: v for k, v in sampling.items() if k not in ("cache_threshold", "batch")}


def check_calibration(
    calibration: CacheCalibration,
    weights: str,
    sampling: Mapping[str, Any],
    num_frames: int,
    fps: float,
    where: str,
) -> None:
    """Raises ConfigError if it was found with other weights, another sampling, or clips of
    another length or rate."""
    # Through JSON tuples have become lists.
    listed = lambda tree: {k: list(v) if isinstance(v, tuple) else v for k, v in tree.items()}
    asked = what_matters(sampling) | {"num_frames": num_frames, "fps": fps, "weights": weights}
    known = dict(calibration.sampling) | {
        "num_frames": calibration.num_frames,
        "fps": calibration.fps,
        "weights": calibration.weights,
    }
    asked, known = listed(asked), listed(known)
    if other := [
        f"{k} = {asked.get(k)!r}, not {known.get(k)!r}"
        for k in asked | known
        if asked.get(k) != known.get(k)
    ]:
        raise ConfigError(
            f"{where} was found for something else: {'; '.join(other)}. Calibrate "
            "again with --calibrate_cache and the same flags, or leave --step_cache away."
        )


@dataclasses.dataclass(frozen=True)
class _Clips:
    """Clips one by one, uint8 [t h w c]: one program for all thresholds, and the plain one."""

    generator: Generator
    params: Params
    prompts: Sequence[str]
    seeds: Sequence[int]
    num_frames: int
    fps: float

    def plain(self, i: int) -> np.ndarray:
        g = self.generator
        return to_uint8(
            g(
                self.params,
                [self.prompts[i]],
                [self.seeds[i]],
                num_frames=self.num_frames,
                fps=self.fps,
            )[0]
        )

    def reused(self, i: int, threshold: float) -> tuple[np.ndarray, int]:
        """(clip, evaluations made)"""
        g = self.generator
        n = g.at_once(1)
        batch = g.batch([self.prompts[i]] * n, self.num_frames, self.fps)
        x0, made = g.from_seeds(
            self.params,
            batch,
            np.full(n, self.seeds[i]),
            None,
            np.float32(threshold),
            (self.num_frames, *g.frame_shape),
        )
        return to_uint8(x0[0]), int(np.sum(made))


def calibrate(
    generator: Generator,
    params: Params,
    prompts: Sequence[str],
    *,
    seed: int,
    num_frames: int,
    fps: float,
    floor: float,
    weights: str,
    say: Say = print,
) -> CacheCalibration:
    """The proof of the largest threshold, by bisection, at which the SSIM of every clip to that
    of all evaluations is at least `floor`; 0 if there is none. Clip i has seed + i.

    Clips are drawn one by one: in a batch the network is asked at least as often.
    """
    if not 0 < floor <= 1:
        raise ConfigError(f"--calibrate_cache={floor} is an SSIM, above 0 and at most 1.")
    clips = _Clips(
        generator, params, prompts, [seed + i for i in range(len(prompts))], num_frames, fps
    )
    full = len(generator.step_table()["t"])
    want = [clips.plain(i) for i in range(len(prompts))]

    def judged(threshold: float) -> tuple[list[float], list[int]] | None:
        found: list[float] = []
        counts: list[int] = []
        for i, prompt in enumerate(prompts):
            clip, made = clips.reused(i, threshold)
            found.append(ssim(clip, want[i]))
            counts.append(made)
            if found[-1] < floor:
                say(
                    f"cache_threshold = {threshold:.4g}: SSIM {found[-1]:.4f} is below the floor, {prompt!r}"
                )
                return None
        say(
            f"cache_threshold = {threshold:.4g}: SSIM at least {min(found):.4f}, {np.mean(counts):.1f} "
            f"evaluations of {full}"
        )
        return found, counts

    best, result = 0.0, ([1.0] * len(prompts), [full] * len(prompts))
    low, high = np.log(LEAST), np.log(MOST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if (found := judged(threshold := float(np.exp(middle)))) is None:
            high = middle
        else:
            low, best, result = middle, threshold, found
    return CacheCalibration(
        best,
        floor,
        tuple(prompts),
        tuple(clips.seeds),
        tuple(result[0]),
        tuple(result[1]),
        full,
        {
            "full": _seconds(lambda: clips.plain(0)),
            "reused": _seconds(lambda: clips.reused(0, best) if best else clips.plain(0)),
        },
        num_frames,
        fps,
        weights,
        what_matters(dataclasses.asdict(generator.sampling)),
    )


def _seconds(call: Callable[[], Any]) -> float:
    """The median of a few."""
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
