"""Clips from a folder of pretrained weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vdx.config.build import ConfigError, fill
from vdx.generate.manifest import PretrainedWeights, manifest_weights
from vdx.generate.pipeline import Pipeline
from vdx.generate.pretrained import PretrainedGenerator
from vdx.generate.pretrained_checks import check
from vdx.generate.pretrained_request import (
    PretrainedRequest,
    complete,
    default_dtype,
    default_mesh,
    remake,
)
from vdx.interop.pretrained import open_pretrained
from vdx.parallel import MeshSpec


class PretrainedPipeline(Pipeline[PretrainedRequest]):
    """Draws clips with a pretrained model.

    Networks are read one after another while clips are drawn, and released again.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: str | None = None,
        mesh: Mapping[str, int] | None = None,
        log: Callable[[str], None] = lambda line: None,
    ):
        """Open a folder; reads headers alone.

        dtype: float32 or bfloat16, of the text encoder and the transformer. mesh: devices along
        each axis. log: receives a line with the time of each thing that is done. Raises
        WeightsError for a folder that is no model, ConfigError for a mesh that does not fit.
        """
        self.where = str(folder)
        self.model = open_pretrained(folder, dtype or default_dtype())
        self.mesh = dict(mesh or default_mesh(self.model))
        self.log = log
        self._identity: str | None = None

    def request(
        self, prompts: Sequence[str], *, seed: int = 0, **settings: Any
    ) -> PretrainedRequest:
        """Complete a request with the defaults of folder and family, and check it.

        settings: vdx.generate.pretrained_request.SETTINGS. Raises ConfigError and WeightsError.
        """
        if not prompts:
            raise ConfigError("A request needs at least one prompt.")
        given = {name: _json(value) for name, value in settings.items()}
        fields = {"prompts": tuple(prompts), "seed": seed, "mesh": self.mesh}
        request = complete(self.model, {**given, **fields})
        self._check(request)
        return request

    def _check(self, request: PretrainedRequest) -> None:
        mesh = fill(MeshSpec, request.mesh, "mesh").make()
        check(request, self.model, mesh)
        self.model.check(mesh)

    def manifest_request(self, manifest: Mapping[str, Any], **moved: Any) -> PretrainedRequest:
        """Return the checked request of a manifest.

        moved: new paths of its input files, and a new mesh.
        Raises ConfigError for a manifest of another dtype than this pipeline's.
        """
        request = remake(manifest["request"], moved)
        if request.dtype != self.model.dtype:
            raise ConfigError(
                f"The manifest's clip is of dtype {request.dtype}, and {self.where} is open in "
                f"{self.model.dtype}: open it with dtype={request.dtype!r}."
            )
        self._check(request)
        return request

    def manifest_weights(self, manifest: Mapping[str, Any]) -> PretrainedWeights:
        """Return the record of the weights. Raises ConfigError for those of a run."""
        return manifest_weights(manifest, PretrainedWeights)

    def weights(self) -> PretrainedWeights:
        """Return the folder and its identity; reads a few megabytes, once."""
        if self._identity is None:
            self._identity = self.model.identity()
        return PretrainedWeights(self.where, self._identity)

    def stream(
        self, request: PretrainedRequest, *, exact: bool = False
    ) -> Iterator[Iterator[np.ndarray]]:
        """Yield the clips, decoded piece by piece: uint8, or float32 if `exact`."""
        mesh = fill(MeshSpec, request.mesh, "mesh").make()
        return PretrainedGenerator(self.model, request, mesh, self.log).clips(exact)


def _json(value: Any) -> Any:
    """Return a setting with paths as text and lists as tuples."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return tuple(_json(one) for one in value)
    return value
