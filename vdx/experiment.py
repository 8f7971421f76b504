"""Sections of a config -> the objects that they name.

`Experiment` is what the entrypoints share: `vdx.main` trains it, `vdx.sample` draws from it,
`vdx.evaluate` evaluates it. The resolved config is enough to make it again.
"""

import contextlib
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from vdx.config.build import ConfigError, build, check_spec, fill, lookup
from vdx.config.renamed import check_renamed_keys
from vdx.config.sections import (
    DataSection,
    ExperimentSections,
    ModelSection,
    Spec,
    TrainSection,
)
from vdx.data.pipeline import Batches, DataError, Loader, make_loader
from vdx.data.record import BadRecord
from vdx.data.signals import SIGNALS
from vdx.data.sources import SOURCES
from vdx.data.transforms import ClipSampling, to_example
from vdx.diffusion.losses import LOSS_TERMS, LossTerm
from vdx.diffusion.process import PROCESSES
from vdx.diffusion.time_sampling import TIME_SAMPLERS
from vdx.files import read_json_object
from vdx.generate.blockwise import BlockwiseGenerator
from vdx.generate.generator import Generator, Sampling
from vdx.models.adapters.lora import Lora
from vdx.models.adapters.trainable import Trainable
from vdx.models.denoiser import Denoiser
from vdx.models.encoders.tokenizer import report_cut
from vdx.parallel import MeshSpec
from vdx.seeds import seed_key
from vdx.train.checkpoint import locate
from vdx.train.job import TrainJob
from vdx.train.objectives import OBJECTIVES, Objective
from vdx.train.optim import Optimizer
from vdx.train.state import TrainState, init_state
from vdx.types import Params, PRNGKeyArray
from vdx.weights import StartingWeights

__all__ = ["Experiment", "Spec", "load", "with_pixel_mean"]

MEAN_CLIPS = 64  # clips over which the mean of the pixels is measured
DEFAULT_PROMPTS = 8  # captions of the data that are drawn if the config names no prompts
CAPTIONS_TRIED = 64  # records that are read for them, since some may be bad


class Experiment:
    """The objects of a config. Raises ConfigError for a config that cannot be built."""

    def __init__(self, config: Spec):
        self.config = dict(config)
        sections = fill(ExperimentSections, config, "config")
        self.seed = sections.seed

        # Sections without a network
        self.data = fill(DataSection, sections.data, "config.data")
        self.training = fill(TrainSection, sections.train, "config.train")
        self.eval = sections.eval
        self.optimizer = fill(Optimizer, sections.optim, "config.optim")
        self.mesh_spec = fill(MeshSpec, sections.mesh, "config.mesh")
        self.sampling = fill(Sampling, sections.sample, "config.sample")

        # Data, which is opened later
        for replaced in ({}, self.data.validation):
            check_spec({**self.data.source, **replaced}, SOURCES, "config.data.source")
        self.clip: ClipSampling | None = None
        if self.data.clip is not None:
            self.clip = fill(ClipSampling, self.data.clip, "config.data.clip")
        loader = {"seed": self.seed, **self.data.loader}
        self.loader = fill(Loader, loader, "config.data.loader")

        # The network, and what is trained of it
        model = fill(ModelSection, sections.model, "config.model")
        self.model = Denoiser(model.backbone, model.signals)
        self.lora = None
        if sections.lora is not None:
            self.lora = fill(Lora, sections.lora, "config.lora")
        self.weights = StartingWeights(
            self.model,
            build_trained_part(self.lora, sections.trainable),
            path=sections.weights,
            resume=sections.resume,
            init=sections.init,
            metadata=lambda: getattr(self.source(), "metadata", {}),
        )

        # The mathematics of training
        check_first_frame(sections, self.model)
        self.process = build(sections.process, PROCESSES, "config.process")
        self.objective = self.build_objective(sections)

        # Shapes, without any array. Last: a large network takes seconds
        self.shapes = self.weights.shapes  # raises for a model that cannot be built
        self.kernels = self.weights.kernels
        if isinstance(self.trained_part, Trainable):
            self.trained_part.check(self.shapes)

    @property
    def trained_part(self) -> Lora | Trainable | None:
        """The part of the network that is trained; None: all of it."""
        return self.weights.trained_part

    def build_objective(self, sections: ExperimentSections) -> Objective:
        """Build the training objective."""
        return OBJECTIVES["denoising"](
            model=self.model,
            process=self.process,
            time_sampler=build(sections.time_sampler, TIME_SAMPLERS, "config.time_sampler"),
            loss_terms=build_loss_terms(sections.loss),
            loss_bins=self.training.loss_bins,
            mean=self.data.mean or 0.0,
            trained_part=self.trained_part,
            first_frame=sections.first_frame,
            diffusion_forcing=sections.diffusion_forcing,
        )

    def check_shapes(self) -> None:
        """Raise ConfigError if the model cannot draw a clip of the data, or take one in."""
        if self.clip is None:
            return
        height, width = self.data.height, self.data.width
        lengths = () if self.loader.buckets else self.clip.lengths
        frames, _ = self.clip_default()
        generator = self.generator()

        where = "config.data.loader.buckets"
        try:
            for bucket in self.loader.buckets:
                self.model.num_tokens((1, *bucket[:3]))

            where = "config.data.clip, height and width"
            for length in lengths:
                self.model.num_tokens((1, length, height, width))
            generator.check((frames, *generator.frame_shape))
        except ValueError as error:  # of the network, which has no config
            raise ConfigError(f"{where}: {error}") from error

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer's update, for the whole length of the run.

        Raises ConfigError if the model cannot be trained on the clips of the data.
        """
        self.check_shapes()
        return self.optimizer.make(self.training.steps)

    # Data

    def source(self, validation: bool = False) -> Any:
        """Open the data set: a row of SOURCES. Raises ConfigError and DataError."""
        replaced = self.data.validation if validation else {}
        try:
            return build({**self.data.source, **replaced}, SOURCES, "config.data.source")
        except ConfigError:
            raise
        except ValueError as error:  # of files, which have no config
            raise DataError(str(error)) from error

    def batches(
        self,
        *,
        validation: bool = False,
        seed: int | None = None,
        workdir: Path | None = None,
        **settings: Any,
    ) -> Batches:
        """Open this process's share of the batches.

        Bad records are named in the workdir's `bad_records.jsonl`; `settings` override fields
        of the loader.
        """
        source = self.source(validation)
        self.weights.check_encoders(getattr(source, "metadata", {}))

        # Record -> example; a source without clips to cut gives ready examples.
        make_example = None
        if self.clip is not None:
            tokenizer = self.model.tokenizer()
            if not validation and jax.process_index() == 0:
                report_cut("captions", self.training_captions, tokenizer)
            make_example = functools.partial(
                to_example,
                clip=self.clip,
                height=self.data.height,
                width=self.data.width,
                tokenize=tokenizer,
                signals=tuple(name for name in self.model.signals if name in SIGNALS),
            )
        seed = self.seed if seed is None else seed
        source = self.source(validation)

        return make_loader(
            source,
            to_example=make_example,
            num_frames=None if self.clip is None else self.clip.lengths,
            # Clips of one shape have no nearest bucket: all buckets take turns.
            clip=None if getattr(source, "one_shape", False) else self.clip,
            # Every process reads its own share.
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            bad_log=None if workdir is None else workdir / "bad_records.jsonl",
            shapes_file=None if workdir is None else workdir / "clip_shapes.json",
            **{"seed": seed, **self.data.loader, **settings},
        )

    @functools.cached_property
    def training_captions(self) -> list[str]:
        """The captions of the first training clips, as many as are read quickly."""
        return list(self.source().captions())

    @functools.cached_property
    def sample_prompts(self) -> tuple[str, ...]:
        """Prompts of the samples drawn during training; by default the first captions."""
        if self.training.sample_prompts:
            return self.training.sample_prompts
        source = self.source()
        if self.clip is None:
            return tuple(itertools.islice(source.captions(), DEFAULT_PROMPTS))
        captions: list[str] = []
        for i in range(min(CAPTIONS_TRIED, len(source))):
            with contextlib.suppress(BadRecord):  # the pipeline counts and names it
                captions.append(source[i].caption)
            if len(captions) == DEFAULT_PROMPTS:
                break
        return tuple(captions)

    # Training

    def new_params(self, key: PRNGKeyArray) -> Params:
        """Return new values of what is trained: all parameters, some, or adapters."""
        return self.weights.new_params(key)

    def init_state(self, params: Params | None = None) -> TrainState:
        """Return the state at step 0, with new parameters where the given ones lack some.

        Traceable, so that jit creates every array where it is sharded.
        """
        return init_state(self.weights.complete(params, seed_key(self.seed)), self.tx, self.seed)

    def job(self) -> TrainJob:
        """Return the experiment as the training loop sees it."""
        return TrainJob(
            config=self.config,
            settings=self.training,
            objective=self.objective,
            optimizer=self.optimizer,
            tx=self.tx,
            init_state=self.init_state,
            open_batches=self.batches,
            loader=self.loader,
            weights=self.weights,
        )

    # Generation

    def generator(
        self, sampling: Sampling | None = None, size: tuple[int, int] | None = None
    ) -> Generator:
        """Return the generator for this model; `size` is (height, width)."""
        height, width = size or (self.data.height, self.data.width)
        is_blockwise = self.objective.diffusion_forcing and self.model.block
        make = BlockwiseGenerator if is_blockwise else Generator
        return make(
            self.model,
            self.process,
            sampling or self.sampling,
            (height, width, self.model.channels),
            self.objective.mean,
            self.objective.first_frame > 0,
        )

    def clip_default(self) -> tuple[int, float]:
        """Return (frames, frames per second): training's first length and first rate.

        Raises ConfigError if the config does not cut clips.
        """
        if self.clip is None:
            raise ConfigError("config.data.clip is not set: give --num_frames and --fps.")
        # Clips that are cut by a stride have no common rate: 8 frames per second then.
        rate = self.clip.rates[0] if self.clip.rates else 8.0
        return self.clip.lengths[0], rate


def build_trained_part(lora: Lora | None, trainable: str | None) -> Lora | Trainable | None:
    """Return the part that is trained; raise ConfigError if two are named."""
    if trainable is None:
        return lora
    if lora is not None:
        raise ConfigError("config.lora and config.trainable: set one of them.")
    return Trainable(trainable)


def build_loss_terms(loss: Spec) -> dict[str, LossTerm]:
    """Build the terms of `config.loss`, by their names in LOSS_TERMS."""
    if not loss:
        raise ConfigError(f"config.loss has no term. Known: {', '.join(LOSS_TERMS)}.")
    terms = {}
    for name, fields in loss.items():
        term = lookup(name, LOSS_TERMS, "config.loss")
        if not isinstance(fields, Mapping):
            raise ConfigError(
                f"config.loss.{name} = {fields!r}: expected the fields of the term, such as "
                "{'weight': 1.0}."
            )
        terms[name] = fill(term, fields, f"config.loss.{name}")
    return terms


def check_first_frame(sections: ExperimentSections, model: Denoiser) -> None:
    """Raise ConfigError if a token is longer than the frame that `first_frame` gives."""
    frames = model.backbone.patch[0]
    if sections.first_frame and frames > 1:
        raise ConfigError(
            f"config.first_frame = {sections.first_frame} gives the first frame a time of its "
            f"own, but a token of this model is {frames} frames long "
            "(config.model.backbone.patch). The signal known_frames works with any."
        )


def with_pixel_mean(config: Spec, workdir: Path) -> Experiment:
    """Build an experiment and fill in `config.data.mean`.

    The mean is that of the run being resumed, or measured over 64 training clips.
    """
    experiment = Experiment(config)
    if experiment.data.mean is not None or experiment.clip is None:
        return experiment

    mean = earlier_mean(experiment, workdir)
    if mean is None:
        mean = measure_mean(experiment)
    if mean is None:
        return experiment  # no record could be read: the pipeline reports why
    return Experiment({**config, "data": {**config["data"], "mean": mean}})


def earlier_mean(experiment: Experiment, workdir: Path) -> float | None:
    """Return the mean that the run being resumed has used, or None."""
    folders = [workdir]
    if experiment.weights.resume:
        folders.append(locate(experiment.weights.resume).workdir)
    for folder in folders:
        path = folder / "config.json"
        if path.exists():
            mean = read_json_object(path)["data"].get("mean")
            if mean is not None:
                return mean
    return None


def measure_mean(experiment: Experiment) -> float | None:
    """Measure the mean of the pixels in [-1, 1]; return None if no record can be read."""
    assert experiment.clip is not None
    source = experiment.source()
    rng = np.random.default_rng(experiment.seed)
    frames = experiment.clip.lengths[0]
    means = []
    for i in rng.permutation(len(source))[:MEAN_CLIPS].tolist():
        with contextlib.suppress(BadRecord):  # the pipeline counts and names it
            record = source[i]
            times, _ = experiment.clip.times(record, frames, rng)
            means.append(record.read(times).mean() / 127.5 - 1.0)
    if not means:
        return None
    return round(float(np.mean(means)), 4)


def load(workdir: Path) -> Experiment:
    """Build the experiment of a run from its workdir.

    Raises FileNotFoundError for a folder that is not the workdir of a run.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: {workdir} is not the workdir of a run. "
            "Train first: python -m vdx.main --config=... --workdir=..."
        )
    config = read_json_object(path)
    check_renamed_keys(config, source=str(path))
    return Experiment(config)
