"""Jobs to plan: a program of an experiment, and the slice of chips to run it on."""

import dataclasses
import functools
import importlib.util
import math
import re
from typing import Any, cast

from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from vdx.config.build import ConfigError, lookup
from vdx.experiment import Experiment
from vdx.hardware import CHIPS, Chip
from vdx.parallel import AXES, MeshSpec


def abstract_mesh(spec: MeshSpec, devices: int) -> Mesh:
    """Return a mesh of unspecified devices.

    Its type is AbstractMesh, which lays out shapes as a Mesh does. It is annotated as a Mesh
    because the functions that lay out parameters and batches are.

    Raises ConfigError if the sizes do not divide the number of devices.
    """
    axis_types = (AxisType.Auto,) * len(AXES)
    return cast(Mesh, AbstractMesh(spec.shape(devices), AXES, axis_types=axis_types))


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips to plan for."""

    name: str  # "v5e:4x4", a row of CHIPS and a topology, or "h100:8", a row and a number

    def __post_init__(self) -> None:
        """Raise ConfigError for an unknown chip or a malformed topology."""
        self.devices  # noqa: B018

    @functools.cached_property
    def chip(self) -> Chip:
        """Return the chip's row of CHIPS. Raises ConfigError for an unknown one."""
        return lookup(self.name.partition(":")[0], CHIPS, "--topology")

    @property
    def compiles(self) -> bool:
        """Return whether programs are compiled for these chips, or only estimated."""
        return self.chip.kind.startswith("TPU")

    @property
    def devices(self) -> int:
        """Return the number of devices. Raises ConfigError for a malformed topology."""
        sizes = self.name.partition(":")[2]
        pattern = r"\d+(x\d+)*" if self.compiles else r"\d+"
        if not re.fullmatch(pattern, sizes):
            raise ConfigError(
                f"--topology={self.name} is not like v5e:4x4 or h100:8. Known chips: "
                f"{', '.join(CHIPS)}."
            )
        return math.prod(map(int, sizes.split("x"))) * self.chip.per_chip

    def mesh(self, spec: MeshSpec) -> Mesh:
        """Return the mesh of a config over these chips.

        Raises ConfigError without the TPU compiler, or for a slice that it rejects.
        """
        if not self.compiles:
            return abstract_mesh(spec, self.devices)
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError(
                "To plan for a TPU, vdx runs its compiler, libtpu, which is not installed. No "
                "TPU is needed for it: pip install 'vdx[tpu]'"
            )

        try:
            description = topologies.get_topology_desc(platform="tpu", topology_name=self.name)
        except Exception as error:
            raise ConfigError(
                f"--topology={self.name}: the TPU compiler has no such slice. It has "
                f"v5e:2x2, v5e:4x4, v5p:2x2x2, v6e:4x4 and others like them. Its error: {error}"
            ) from error
        return spec.make(description.devices)


@dataclasses.dataclass(frozen=True)
class Job:
    """A program of an experiment."""

    experiment: Experiment
    what: str  # a row of vdx.planning.programs.PROGRAMS: "train", "sample" or "decode"
    clip: tuple[int, ...]  # [t h w c] in the model's space
    text: int | None  # tokens of a cached caption; None: the signals have their own length

    @property
    def clips(self) -> int:
        """Return the number of clips of one call."""
        match self.what:
            case "train":
                return self.experiment.data.loader["global_batch"]
            case "sample":
                return self.experiment.sampling.batch
            case _:  # a decoder decodes clip by clip
                return 1

    def with_backbone(self, **fields: Any) -> "Job":
        """Return the job with other fields of `config.model.backbone`."""
        model = self.experiment.config["model"]
        return self.with_sections(model={**model, "backbone": {**model["backbone"], **fields}})

    def with_sections(self, **sections: Any) -> "Job":
        """Return the job with other sections of the config."""
        config = {**self.experiment.config, **sections}
        return dataclasses.replace(self, experiment=Experiment(config))


def complete_shapes(
    experiment: Experiment, clip: tuple[int, ...] | None, text: int | None
) -> tuple[tuple[int, ...], int | None]:
    """Return ([t h w c] of a clip in the model's space, tokens of a cached caption).

    clip: [t h w], and text: as given on the command line. If None, they are those of the data.

    Raises ConfigError for a clip of other than three sizes, or if the data have no sizes either.
    """
    channels = experiment.model.channels
    if clip is not None and len(clip) != 3:
        raise ConfigError(f"--clip={','.join(map(str, clip))} is not frames, height and width.")

    # Pixels: the config has the sizes.
    if experiment.clip is not None:
        sizes = experiment.clip.lengths[0], experiment.data.height, experiment.data.width
        return (*(clip or sizes), channels), text

    # Cached latents: the metadata of the data have the sizes.
    needs_text = text is None and "embeddings" in experiment.model.signals
    if clip is None or needs_text:
        metadata = _metadata(experiment)
        latents = tuple(metadata.get("latents") or (None,))
        if clip is None and None not in latents:
            clip = latents[:3]
        text = text or (metadata.get("text") or (None,))[0]

        if clip is None or text is None:
            raise ConfigError(
                "The metadata of config.data.path do not contain the sizes of its clips, or no "
                "data is there. Give the frames, height and width of the latents, and the number "
                "of tokens of a caption: --clip=16,32,32 --text=256"
            )
    return (*clip, channels), text


def _metadata(experiment: Experiment) -> dict[str, Any]:
    """Return the metadata of the training data, empty if there is no data."""
    try:
        return getattr(experiment.source(), "metadata", {})
    except (ConfigError, OSError, ValueError):
        return {}
