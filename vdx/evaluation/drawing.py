"""Drawn clips: the one place where evaluators draw, with the pipeline of the run."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from vdx.data.record import BadRecord, Record, clip_times
from vdx.data.resize import resize
from vdx.experiment import Experiment
from vdx.generate.run_pipeline import RunPipeline
from vdx.generate.video_io import check_finite, to_uint8
from vdx.load_pipeline import params_pipeline
from vdx.types import Params

__all__ = ["FIRST_SEED", "ClipDrawer"]

FIRST_SEED = 10_000  # seed of the first evaluated clip; the sample grid of training uses 0, 1, ...


@dataclasses.dataclass(frozen=True)
class ClipDrawer:
    """The pipeline of a run, set to the usual length and rate of its clips."""

    experiment: Experiment
    mesh: Mesh  # of the run

    @functools.cached_property
    def pipeline(self) -> RunPipeline:
        """The pipeline of the run, which keeps its compiled programs."""
        return params_pipeline(self.experiment, self.mesh)

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

        controls: entries of the batch for other signals than the text, each [n ...]. Raises
        NotFinite that names the first clip with pixels that are NaN or infinite.
        """
        pipeline = self.pipeline.with_params(params)
        request = pipeline.request(prompts, seed=FIRST_SEED, fps=fps or self.fps)
        clips = pipeline.draw_arrays(request, controls or {})
        for seed, prompt, clip in zip(request.seeds, prompts, clips, strict=True):
            check_finite(np.isfinite(clip), f"The clip of prompt {prompt!r} and seed {seed}")
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
            frames = record.read(clip_times(record, self.fps, self.num_frames))
        except BadRecord:
            return None
        return resize(frames, self.experiment.data.height, self.experiment.data.width)
