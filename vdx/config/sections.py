"""The sections of a config as dataclasses: a field a key, with its meaning.

`vdx.config.build.fill` checks a config against these classes; `vdx.experiment` turns the
checked sections into objects. A `Spec` is a section whose keys depend on a row of a table, so
it stays a mapping here and is checked where the row is built.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from vdx.config.build import check_fields
from vdx.config.ranges import (
    Count,
    Decay,
    Fraction,
    Index,
    Interval,
    NonNegative,
    Positive,
    Seed,
)

__all__ = [
    "DataSection",
    "ExperimentSections",
    "ModelSection",
    "Spec",
    "TrainSection",
]

Spec = Mapping[str, Any]


def _plain_denoising() -> dict[str, Spec]:
    """Return the loss of Ho et al. 2020: the squared error, unweighted."""
    return {"denoising": {"weighting": {"name": "none"}}}


@dataclasses.dataclass(frozen=True)
class DataSection:
    """`config.data`: the clips, how they are cut, and how batches are read."""

    source: Spec  # the training clips: a row of SOURCES with its fields
    loader: Spec  # fields of vdx.data.pipeline.Loader
    # Fields of `source` that replace those above for the validation clips.
    validation: Spec = dataclasses.field(default_factory=dict)
    clip: Spec | None = None  # fields of ClipSampling; None: the source gives ready examples
    height: Count = 32  # pixels; ready examples ignore it
    width: Count = 32  # pixels
    # Mean of the pixels in [-1, 1], which training subtracts, as the mean of a VAE's latents is
    # subtracted when they are cached. None: `vdx.experiment.with_pixel_mean` measures it.
    mean: Annotated[float, Interval(-1, 1)] | None = None
    path: str | None = None  # a place that `source` can refer to, for a short command line


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """`config.train`: how long a run is, and the work between its steps.

    Intervals are in steps; 0 turns the work off.
    """

    steps: Count  # optimizer steps of the whole run
    ema: Decay = 0.999  # decay of the averaged parameters
    log_every: Index = 20  # steps between rows of metrics.jsonl
    sample_every: Index = 500  # steps between sample grids
    save_every: Index = 500  # steps between checkpoints
    max_to_keep: Count = 2  # newest checkpoints kept; 2, so that a damaged one has a predecessor
    keep_period: Index = 0  # checkpoints at multiples of it are kept too
    # The checkpoint with the lowest value of this metric, such as "validation/loss", is kept too.
    best_metric: str = ""
    # A batch is refused if its gradient norm exceeds the running mean of the norms this many
    # times; 0: only if it is not finite.
    max_grad_norm_ratio: NonNegative = 20.0
    max_bad_steps: Count = 3  # refused batches in a row that send the run back to a checkpoint
    max_rollbacks: Index = 2  # returns to a checkpoint before the run stops with an error
    watchdog_seconds: Positive = 1800.0  # without a step, after which the program ends
    loss_bins: Count = 5  # equal intervals of diffusion time that the training loss is logged for
    # Prompts of the samples drawn during training, with seeds 0, 1, ...; empty: the first
    # captions of the data.
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "config.train")


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """`config.model`: the network and the signals that condition it."""

    backbone: Spec  # a row of BACKBONES with its fields
    signals: Spec  # rows of SIGNALS by name, each with its fields


@dataclasses.dataclass(frozen=True)
class ExperimentSections:
    """The top level of a config.

    A run starts from the first of these that exists: the checkpoints of its own workdir,
    `resume`, `init`, `weights`, new parameters. A run is named by its workdir, or by one step of
    it: runs/a/checkpoints/500.

    With `lora` or `trainable` only a part of the network is trained, saved, and read from
    `resume` and `init`; `weights` is then always read, since it names the frozen network.
    """

    data: Spec  # DataSection
    model: Spec  # ModelSection
    process: Spec  # a row of PROCESSES with its fields
    train: Spec  # TrainSection
    seed: Seed = 0  # of new parameters, of the order of the clips and of every draw in training
    # A row of TIME_SAMPLERS with its fields.
    time_sampler: Spec = dataclasses.field(default_factory=lambda: {"name": "uniform"})
    # Rows of LOSS_TERMS by name, each with its fields; their weighted sum is minimised.
    loss: Mapping[str, Spec] = dataclasses.field(default_factory=_plain_denoising)
    optim: Spec = dataclasses.field(default_factory=dict)  # fields of Optimizer
    mesh: Spec = dataclasses.field(default_factory=dict)  # fields of MeshSpec
    sample: Spec = dataclasses.field(default_factory=dict)  # fields of Sampling
    # Rows of EVALUATORS (vdx.evaluation.table) by name, each with its fields; None: off.
    eval: Mapping[str, Spec | None] = dataclasses.field(default_factory=dict)
    resume: str | None = None  # a run whose state and position in the data are continued
    init: str | None = None  # a run whose averaged parameters are the first ones
    # A pretrained network: a file or folder that vdx.interop.wan, latte or unet reads, several
    # files that make up one U-Net, or a run.
    weights: str | tuple[str, ...] | None = None
    lora: Spec | None = None  # fields of Lora: adapters are trained
    # A regex of parameter paths that are trained; those that `weights` lacks start new.
    trainable: str | None = None
    # Share of the clips whose first latent frame is given: without noise, at time 0.
    first_frame: Fraction = 0.0
    # Every block of a clip has a time of its own; a network with blocks then draws clips block
    # by block.
    diffusion_forcing: bool = False
