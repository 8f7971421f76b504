"""A config made real: every section checked and turned into the object it names.

`Experiment` is what the entrypoints share: `vdx.main` trains it, `vdx.sample` draws from it,
`vdx.evaluate` judges it. The resolved config is all that is needed to make it again.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from vdx.config.build import ConfigError, build, fill
from vdx.data.pipeline import Batches, Loader, make_loader
from vdx.data.record import BadRecord
from vdx.data.signals import SIGNALS
from vdx.data.sources import SOURCES
from vdx.data.transforms import ClipSampling, to_example
from vdx.diffusion.losses import WEIGHTINGS
from vdx.diffusion.process import PROCESSES
from vdx.diffusion.time_sampling import TIME_SAMPLERS
from vdx.files import read_json
from vdx.generate.blockwise import BlockwiseGenerator
from vdx.generate.pipeline import Generator, Sampling
from vdx.interop.load import abstract_params
from vdx.interop.transformer import load_transformer
from vdx.interop.unet import load_unet
from vdx.models.adapters.lora import Lora, add_deltas, dense_kernels
from vdx.models.adapters.trainable import Trainable, overlay
from vdx.models.conditioning.text_signals import NULL, Embeddings
from vdx.models.denoiser import Denoiser
from vdx.parallel import MeshSpec
from vdx.train.checkpoint import CheckpointError, Checkpoints, check_base, locate
from vdx.train.checksum import digest, whole_digest
from vdx.train.optim import Optimizer
from vdx.train.state import TrainState, init_state
from vdx.train.step import Objective
from vdx.types import Params, PRNGKeyArray

Spec = Mapping[str, Any]
# Of config.weights, by backbone.
READERS: dict[str, Callable[..., Params]] = {"transformer": load_transformer, "unet": load_unet}
MEAN_OF = 64  # clips over which the mean of the pixels is measured
WALL, WALL_OF = 8, 64  # captions of the wall, and clips that are looked at for them


@dataclasses.dataclass(frozen=True)
class Data:
    """source: the training clips, a row of SOURCES. heldout: fields of the source that make it
    the held-out set. clip, loader: fields of ClipSampling and Loader. height, width: pixels."""

    source: Spec
    loader: Spec
    validation: Spec = dataclasses.field(default_factory=dict)
    clip: Spec | None = None
    height: int = 32
    width: int = 32
    mean: float | None = None  # of the pixels in [-1, 1]; subtracted, as from a VAE's latents.
    #                              None: `settled` finds it
    path: str | None = None  # where configs let `source` point, for a short command line


@dataclasses.dataclass(frozen=True)
class Training:
    """Counts are in steps; 0 turns an action off.

    ema: decay of the averaged weights. eval_clips: clips of the held-out and of the training
    set whose loss is measured at the fixed noise `levels`. bins: noise levels of the logged
    loss. wall: prompts of the samples drawn during training, which take seeds 0, 1, ...; empty:
    the first captions of the data. keep: newest checkpoints that stay; keep_every: also those
    at its multiples; best: also the one at which this metric, e.g. "validation/loss", was lowest.
    spike: a batch is refused if its gradient norm exceeds the running mean this many times
    (0: only if it is not finite). bad_in_row: refused batches in a row that send the run back
    to the checkpoint before them; rollbacks: how often, before it stops. stuck_after: seconds
    without a step after which the program ends.
    """

    steps: int
    ema: float = 0.999
    log_every: int = 20
    eval_every: int = 500
    sample_every: int = 500
    save_every: int = 500
    max_to_keep: int = 2
    keep_period: int = 0
    best_metric: str = ""
    max_grad_norm_ratio: float = 20.0
    max_bad_steps: int = 3
    max_rollbacks: int = 2
    watchdog_seconds: float = 1800.0
    eval_clips: int = 64
    eval_times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    loss_bins: int = 5
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self):
        if self.max_to_keep < 1 or self.max_bad_steps < 1:
            raise ConfigError(
                f"config.train.max_to_keep = {self.max_to_keep} and bad_in_row = "
                f"{self.max_bad_steps} must be at least 1."
            )
        if self.best_metric and not (self.eval_every and self.save_every % self.eval_every == 0):
            raise ConfigError(
                f"config.train.best_metric = {self.best_metric!r} needs a measurement at every save: save_every "
                f"= {self.save_every} must be a multiple of eval_every = {self.eval_every}."
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """On held-out scenes: prompts of prompt following, and clips for each signal that steers; 0
    where truth is not known."""

    prompts: int = 0
    steering: int = 0


@dataclasses.dataclass(frozen=True)
class Model:
    backbone: Spec
    signals: Spec


@dataclasses.dataclass(frozen=True)
class Sections:
    """The top level of a config.

    What a run starts from, the first that exists: the checkpoints of its own workdir; `resume`,
    a run whose state and place in the data it takes over; `init`, a run whose averaged weights
    it takes; `weights`, a public network (a file or folder that vdx.interop.transformer or unet
    reads, or several that are parts of one U-Net), or again a run; new weights. Runs are named by a
    workdir, or one step of it: runs/a/checkpoints/500.

    With `lora`, adapters are what is trained, saved and taken from `resume` and `init`, and
    `weights` is always read: it names the frozen network beside them. With `trainable`, a regex,
    these are the parameters whose paths it finds; what of them `weights` lacks begins anew.
    first_frame, forcing: see Objective; a network with blocks that is trained with `forcing` draws
    clips block by block.
    """

    data: Spec
    model: Spec
    process: Spec
    train: Spec
    seed: int = 0
    time_sampler: Spec = dataclasses.field(default_factory=lambda: {"name": "uniform"})
    loss: Spec = dataclasses.field(default_factory=lambda: {"name": "none"})
    optim: Spec = dataclasses.field(default_factory=dict)
    mesh: Spec = dataclasses.field(default_factory=dict)
    sample: Spec = dataclasses.field(default_factory=dict)
    eval: Spec = dataclasses.field(default_factory=dict)
    resume: str | None = None
    init: str | None = None
    weights: str | tuple[str, ...] | None = None
    lora: Spec | None = None
    trainable: str | None = None
    first_frame: float = 0.0
    diffusion_forcing: bool = False


class Experiment:
    """The objects of a config. Raises ConfigError for whatever cannot be meant."""

    def __init__(self, config: Spec):
        self.config = dict(config)
        top = fill(Sections, config, "config")
        self.seed, self.resume, self.init_from = top.seed, top.resume, top.init
        self.weights = top.weights
        self.data = fill(Data, top.data, "config.data")
        self.training = fill(Training, top.train, "config.train")
        self.eval = fill(EvalConfig, top.eval, "config.eval")
        self.optimizer = fill(Optimizer, top.optim, "config.optim")
        self.mesh_spec = fill(MeshSpec, top.mesh, "config.mesh")
        self.sampling = fill(Sampling, top.sample, "config.sample")
        self.clip = (
            None
            if self.data.clip is None
            else fill(ClipSampling, self.data.clip, "config.data.clip")
        )
        fill(Loader, {"seed": self.seed, **self.data.loader}, "config.data.loader")
        model = fill(Model, top.model, "config.model")
        self.model = Denoiser(model.backbone, model.signals)
        # Says what is wrong with the model, now.
        self.shapes = jax.eval_shape(self.model.new_params, jax.random.key(0))
        self.lora, self.kernels = None, {}
        if top.lora is not None:
            self.lora = fill(Lora, top.lora, "config.lora")
            self.kernels = self.lora.select_kernels(dense_kernels(self.model.new_params))
        self.part: Lora | Trainable | None = self.lora
        if top.trainable is not None:
            if self.lora is not None:
                raise ConfigError("config.lora and config.trainable: set one of them.")
            self.part = Trainable(top.trainable)
            self.part.check(self.shapes)
        if top.first_frame and (frames := self.model.backbone.patch[0]) > 1:
            raise ConfigError(
                f"config.first_frame = {top.first_frame} gives the first frame a "
                f"time of its own, but a token of this model is {frames} frames long "
                "(config.model.backbone.patch). The signal known_frames works with "
                "any."
            )
        self.process = build(top.process, PROCESSES, "config.process")
        self.objective = Objective(
            self.model,
            self.process,
            build(top.time_sampler, TIME_SAMPLERS, "config.time_sampler"),
            build(top.loss, WEIGHTINGS, "config.loss"),
            self.training.loss_bins,
            self.data.mean or 0.0,
            self.part,
            top.first_frame,
            top.diffusion_forcing,
        )
        if isinstance(generator := self.generator(), BlockwiseGenerator) and self.clip is not None:
            generator.check((self.clip_default()[0], *generator.frame_shape))

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        return self.optimizer.make(self.training.steps)

    def source(self, validation: bool = False):
        spec = {**self.data.source, **(self.data.validation if validation else {})}
        return build(spec, SOURCES, "config.data.source")

    def batches(
        self,
        *,
        validation: bool = False,
        seed: int | None = None,
        workdir: Path | None = None,
        **settings,
    ) -> Batches:
        """This process's share of the batches; `settings` override fields of the loader."""
        make = lengths = None
        if self.clip is not None:
            lengths = self.clip.lengths
            make = functools.partial(
                to_example,
                clip=self.clip,
                height=self.data.height,
                width=self.data.width,
                tokenize=self.model.tokenizer(),
                signals=tuple(name for name in self.model.signals if name in SIGNALS),
            )
        log = None if workdir is None else workdir / "bad_records.jsonl"
        return make_loader(
            self.source(validation),
            to_example=make,
            num_frames=lengths,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            bad_log=log,
            **{"seed": self.seed if seed is None else seed, **self.data.loader, **settings},
        )

    def new_params(self, key: PRNGKeyArray) -> Params:
        """What is trained, as it begins: the network's parameters, some of them, or adapters."""
        if isinstance(self.part, Lora):
            return self.part.new_factors(key, self.kernels)
        params = self.model.new_params(key)
        return params if self.part is None else self.part.split(params)[1]

    def init(self, params: Params | None = None) -> TrainState:
        """The state at step 0, with the given parameters, and new ones where these lack some.
        Traceable, so that jit can create it where it will lie."""
        if params is None or self.part is not None:
            params = overlay(self.new_params(jax.random.key(self.seed)), params or {})
        return init_state(params, self.tx, self.seed)

    def read_weights(self, mesh: Mesh) -> Params:
        """The network that `config.weights` names, on the mesh: in float32 what is to be
        trained, in the network's type what is frozen. Of what `config.trainable` names, it has
        what is in the files.

        Raises ConfigError, WeightsError, CheckpointError.
        """
        if not self.weights:
            raise ConfigError(
                "config.weights is not set: name the network whose weights stay as "
                "they are, a folder of public weights or a run."
            )
        dtype = "float32" if self.part is None else self.model.backbone.dtype
        trained = self.part.pattern if isinstance(self.part, Trainable) else None
        if (
            isinstance(self.weights, str)
            and ((found := locate(self.weights))[0] / "checkpoints").is_dir()
        ):
            with Checkpoints(found[0], read_only=True) as run:
                params, *_ = run.restore_params(abstract_params(self.shapes, mesh), step=found[1])
            like = abstract_params(self.shapes, mesh, dtype, trained)
            return jax.tree.map(lambda x, to: x.astype(to.dtype), params, like)
        read = READERS[self.model.backbone_config["name"]]
        return read(self.weights, self.model, mesh, dtype, trained)

    def read_frozen(self, mesh: Mesh) -> tuple[Params, Params | None]:
        """(what is not trained, what is trained if the files have it) of `read_weights`."""
        weights = self.read_weights(mesh)
        return self.part.split(weights) if isinstance(self.part, Trainable) else (weights, None)

    def abstract_frozen(self, mesh: Mesh) -> Params | None:
        """Shapes of what `read_frozen` gives as not trained, laid out; None if all is trained."""
        if self.part is None:
            return None
        dtype = self.model.backbone.dtype
        if not isinstance(self.part, Trainable):
            return abstract_params(self.shapes, mesh, dtype)
        return self.part.split(abstract_params(self.shapes, mesh, dtype, self.part.pattern))[0]

    def describe_initialisation(self, given: Params) -> str:
        """How much of what is trained is new, and how much was read."""
        names = flatten_dict(jax.eval_shape(self.new_params, jax.random.key(0)), sep="/")
        read = len(flatten_dict(given, sep="/"))
        return f"{read} trained arrays that were read and {len(names) - read} new ones"

    def with_null(self, params: Params) -> Params:
        """Weights with what stands for a dropped caption. Files of public weights do not have it,
        and it is zero as they are read; the metadata of cached text may say it.

        Raises ConfigError if it is needed and missing.
        """
        leaves = flatten_dict(params, sep="/")
        if NULL not in leaves or np.any(leaves[NULL]):
            return params
        if (null := getattr(self.source(), "metadata", {}).get("null")) is not None:
            return add_deltas(params, {NULL: np.asarray(null, np.float32)})
        rate = self.model.signals["embeddings"].get("dropout", Embeddings.dropout)
        if rate:
            raise ConfigError(
                f"config.model.signals.embeddings.dropout = {rate} drops captions, and the "
                "metadata of the data does not say what stands for them (`null`, the encoding of "
                "the empty caption; see vdx.data.records). Write it there, or set the dropout to 0."
            )
        return params

    @functools.cached_property
    def wall(self) -> tuple[str, ...]:
        """Prompts of the samples drawn during training; by default the first eight captions."""
        if self.training.sample_prompts:
            return self.training.sample_prompts
        source, captions = self.source(), []
        for i in range(min(WALL_OF, len(source))):
            with contextlib.suppress(BadRecord):  # the pipeline counts and names it
                captions.append(source[i].caption)
            if len(captions) == WALL:
                break
        return tuple(captions)

    def generator(
        self, sampling: Sampling | None = None, size: tuple[int, int] | None = None
    ) -> Generator:
        height, width = size or (self.data.height, self.data.width)
        by_block = self.objective.forcing and self.model.block
        return (BlockwiseGenerator if by_block else Generator)(
            self.model,
            self.process,
            sampling or self.sampling,
            (height, width, self.model.channels),
            self.objective.mean,
            self.objective.first_frame > 0,
        )

    def clip_default(self) -> tuple[int, float]:
        """(frames, frames per second) of a clip when nobody says otherwise: the first length
        and the first rate of training."""
        if self.clip is None:
            raise ConfigError("config.data.clip is not set: say --num_frames and --fps.")
        return self.clip.lengths[0], self.clip.rates[0] if self.clip.rates else 8.0


def with_pixel_mean(config: Spec, workdir: Path) -> Experiment:
    """The experiment with what only its data can tell, the mean of the pixels: that of the run
    that is gone on with, if there is one, or else measured over a few clips."""
    experiment = Experiment(config)
    if experiment.data.mean is not None or experiment.clip is None:
        return experiment

    def with_mean(mean: float) -> Experiment:
        return Experiment({**config, "data": {**config["data"], "mean": mean}})

    earlier = [workdir] + ([locate(experiment.resume)[0]] if experiment.resume else [])
    for path in (folder / "config.json" for folder in earlier):
        if path.exists() and (mean := read_json(path)["data"].get("mean")) is not None:
            return with_mean(mean)
    source, rng, means = experiment.source(), np.random.default_rng(experiment.seed), []
    for i in rng.permutation(len(source))[:MEAN_OF].tolist():
        with contextlib.suppress(BadRecord):  # the pipeline counts and names it
            record = source[i]
            times, _ = experiment.clip.times(record, experiment.clip.lengths[0], rng)
            means.append(record.read(times).mean() / 127.5 - 1.0)
    if not means:
        return experiment  # the pipeline says what is wrong
    return with_mean(round(float(np.mean(means)), 4))


def load(workdir: Path) -> Experiment:
    """The experiment that a workdir holds."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: {workdir} is not the workdir of a run. "
            "Train first: python -m vdx.main --config=... --workdir=..."
        )
    return Experiment(read_json(path))


def open_params(
    experiment: Experiment,
    workdir: Path,
    mesh: Mesh,
    *,
    item: str = "ema",
    step: int | str | None = None,
) -> tuple[Any, int, str]:
    """(parameters, step, identity) of a checkpoint, laid out on the mesh; those of a run that
    trained adapters, or a part, beside those of its `config.weights`, which are read again.

    item: "ema", the averaged parameters, or "params". step: a number, "best", or None for the
    newest that verifies. The identity is the same for the same weights. Raises CheckpointError.
    """
    trained, number, identity = open_trained(experiment, workdir, mesh, item=item, step=step)
    if experiment.part is None:
        return trained, number, identity
    frozen, _ = experiment.read_frozen(mesh)
    base = whole_digest(frozen)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        check_base(checkpoints.facts(number)["progress"], base, f"step {number} of {workdir}")
    if (kept := Path(workdir) / "null.npy").exists():  # the data, which told it, may not be here
        frozen = add_deltas(frozen, {NULL: np.load(kept, allow_pickle=False)})
    return experiment.objective.whole(trained, frozen), number, digest([identity, base])


def open_trained(
    experiment: Experiment,
    workdir: Path,
    mesh: Mesh,
    *,
    item: str = "ema",
    step: int | str | None = None,
) -> tuple[Params, int, str]:
    """As `open_params`, of what was trained alone: the network's parameters, some, or adapters."""
    shapes = jax.eval_shape(experiment.new_params, jax.random.key(0))
    if item not in ("ema", "params"):
        raise CheckpointError(f"The weights of a step are 'ema' or 'params', not {item!r}.")
    with Checkpoints(workdir, best=experiment.training.best_metric, read_only=True) as checkpoints:
        number = checkpoints.best_step() if step == "best" else step
        return checkpoints.restore_params(
            abstract_params(shapes, mesh), item, None if number is None else int(number)
        )
