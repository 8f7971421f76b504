"""`vdx.load`: from a workdir or a folder of pretrained weights to a Pipeline."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from vdx.config.build import ConfigError, fill
from vdx.experiment import Experiment
from vdx.experiment import load as load_experiment
from vdx.generate.manifest import PretrainedWeights, RunWeights, manifest_weights
from vdx.generate.pipeline import Pipeline
from vdx.generate.pretrained_pipeline import PretrainedPipeline
from vdx.generate.run_pipeline import ClipDefaults, LoadedWeights, RunPipeline
from vdx.interop.pretrained import INDEX
from vdx.parallel import MeshSpec
from vdx.train.checkpoint import locate
from vdx.weights import open_params

CONFIG = "config.json"  # of a workdir
# Files of the original Wan, which vdx.convert reads.
ORIGINAL = ("diffusion_pytorch_model*.safetensors", "high_noise_model", "models_t5_*.pth")
Log = Callable[[str], None]


def load(
    path: str | Path,
    *,
    step: int | str | None = None,
    averaged: bool = True,
    dtype: str | None = None,
    mesh: Mapping[str, int] | None = None,
    log: Log = lambda line: None,
) -> Pipeline[Any]:
    """Open a run's workdir, one of its checkpoints, or pretrained weights.

    Nothing large is read before the first clip is drawn.

    step (run): a step, or "best"; None: the newest checkpoint that verifies. averaged (run): the
    averaged weights, or those of the step itself. dtype (pretrained): float32 or bfloat16; None:
    float32 on a CPU, else bfloat16. mesh: devices along each axis, such as {"fsdp": 4}; None:
    config.mesh of a run, or as many devices as divide the heads. log (pretrained): receives a
    line with the time of each thing that is done.

    Raises ConfigError for a path that is neither, or an option of the other kind; WeightsError
    for a folder that is no model that vdx draws from.
    """
    # A run, or one of its steps: runs/tiny/checkpoints/500.
    workdir, place = locate(str(path))
    if (workdir / CONFIG).is_file():
        if dtype is not None:
            raise ConfigError(
                f"dtype = {dtype!r}: {path} is a run, which computes in its own "
                "config.model.backbone.dtype. Leave dtype away."
            )
        if place is not None and step is not None:
            raise ConfigError(f"step = {step!r}: {path} names a step already. Give one of them.")
        return _open_run(workdir, place if step is None else step, averaged, mesh)

    # Pretrained weights.
    if (Path(path) / INDEX).is_file():
        if step is not None or not averaged:
            raise ConfigError(
                f"step and averaged are options of a run, and {path} is a folder of pretrained "
                "weights. Leave them away."
            )
        return PretrainedPipeline(path, dtype, mesh, log)

    raise ConfigError(_unknown_path(Path(path)))


def load_for_manifest(
    path: str | Path,
    manifest: Mapping[str, Any],
    mesh: Mapping[str, int] | None = None,
    log: Log = lambda line: None,
) -> Pipeline[Any]:
    """Open the weights in `path` as a manifest needs them, for `Pipeline.remake`.

    That is the step of a run, and the dtype of pretrained weights. Raises ConfigError as `load`
    does.
    """
    if (Path(path) / INDEX).is_file():
        manifest_weights(manifest, PretrainedWeights)
        return load(path, dtype=manifest["request"].get("dtype"), mesh=mesh, log=log)
    made = manifest_weights(manifest, RunWeights)
    return load(path, step=made.step, averaged=made.item == "ema", mesh=mesh)


def run_pipeline(
    experiment: Experiment,
    mesh: Mesh,
    load_weights: Callable[[], LoadedWeights],
    workdir: Path | None = None,
) -> RunPipeline:
    """Return the pipeline of an experiment.

    load_weights: called at the first clip.
    """
    defaults = ClipDefaults()
    if experiment.clip is not None:
        num_frames, fps = experiment.clip_default()
        defaults = ClipDefaults(num_frames, fps, experiment.clip.flow_points)
    return RunPipeline(experiment.generator(), mesh, defaults, load_weights, workdir)


@functools.lru_cache(maxsize=1)
def params_pipeline(experiment: Experiment, mesh: Mesh) -> RunPipeline:
    """Return the pipeline of training and evaluation, whose parameters are in memory.

    `RunPipeline.with_params` gives them. The samples and the evaluators of an experiment share it,
    so that equal programs are compiled once.
    """
    return run_pipeline(experiment, mesh, lambda: LoadedWeights({}, None))


def _open_run(
    workdir: Path, step: int | str | None, averaged: bool, mesh: Mapping[str, int] | None
) -> RunPipeline:
    """Return the pipeline of a workdir, whose checkpoint is read at the first clip."""
    experiment = load_experiment(workdir)
    spec = experiment.mesh_spec if mesh is None else fill(MeshSpec, mesh, "mesh")
    devices = spec.make()
    item = "ema" if averaged else "params"

    def load_weights() -> LoadedWeights:
        params, number, identity = open_params(experiment, workdir, devices, item=item, step=step)
        return LoadedWeights(params, RunWeights(str(workdir), number, item, identity))

    return run_pipeline(experiment, devices, load_weights, workdir)


def _unknown_path(path: Path) -> str:
    """Return a message for a path that cannot be opened."""
    if not path.is_dir():
        found = "is not a folder"
    elif any(any(path.glob(pattern)) for pattern in ORIGINAL):
        return (
            f"{path} has the layout of the original Wan: convert it first, "
            f"python -m vdx.convert --source={path} --out={path.name}-vdx"
        )
    else:
        names = sorted(one.name for one in path.iterdir())[:8]
        found = f"has neither {CONFIG} nor {INDEX}; there are: {', '.join(names) or 'no files'}"
    return (
        f"{path} {found}. Give the workdir of a run (train one: python -m vdx.main --config=... "
        "--workdir=...), or the folder of a model as diffusers saves it or python -m vdx.convert "
        "writes it."
    )
