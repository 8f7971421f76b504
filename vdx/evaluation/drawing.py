"""Drawn clips: the one place where evaluators call the generator."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from vdx.data.record import BadRecord, Record
from vdx.data.resize import resize
from vdx.experiment import Experiment
from vdx.generate.pipeline import Generator
from vdx.generate.video_io import to_uint8
from vdx.types import Params

__all__ = ["FIRST_SEED", "ClipDrawer"]

FIRST_SEED = 10_000  # seed of the first evaluated clip; the sample grid of training uses 0, 1, ...


@dataclasses.dataclass(frozen=True)
class ClipDrawer:
    """The generator of a run, set to the usual length and rate of its clips."""

    experiment: Experiment

    @functools.cached_property
    def generator(self) -> Generator:
        """The generator of the run, which keeps its compiled programs."""
        return self.experiment.generator()

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return self.experiment.clip_default()[0]

    @property
    def fps(self) -> float:
        """Frames per second of a clip."""
        return self.experiment.clip_default()[1]

    @property
    def times(self) -> np.ndarray:
        """Instants of the frames of a clip, float64 [t] seconds."""
        return np.arange(self.num_frames) / self.fps

    def draw(
        self,
        params: Params,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        controls: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Draw uint8 [n t h w 3]; clip i starts from the noise of seed FIRST_SEED + i.

        controls: entries of the batch for other signals than the text, each [n ...].
        """
        seeds = [FIRST_SEED + i for i in range(len(prompts))]
        clips = self.generator(
            params,
            prompts,
            seeds,
            num_frames=self.num_frames,
            fps=fps or self.fps,
            controls=controls,
        )
        return to_uint8(clips)

    def validation_records(self, count: int) -> list[Record]:
        """Return the first `count` validation records that can be read, or all if fewer."""
        source = self.experiment.source(validation=True)
        records: list[Record] = []
        for index in range(len(source)):
            if len(records) == count:
                break
            try:
                records.append(source[index])
            except BadRecord:  # the pipeline counts and names it
                continue
        return records

    def true_clip(self, record: Record) -> np.ndarray | None:
        """Read uint8 [t h w 3] of a record from its start; None if it is too short."""
        last = self.times[-1]
        if last >= record.duration:
            return None
        try:
            frames = record.read(self.times)
        except BadRecord:
            return None
        return resize(frames, self.experiment.data.height, self.experiment.data.width)
