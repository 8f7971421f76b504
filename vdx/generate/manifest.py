"""Manifests: JSON files from which clips are made again, bit for bit.

A manifest names the request, the weights with their identity, the versions, and a SHA-256 of the
pixels. It never chooses which folder is opened: a manifest from elsewhere could name any.
"""

import dataclasses
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from vdx.config.build import ConfigError, fill
from vdx.config.renamed import check_renamed_keys
from vdx.files import read_json
from vdx.generate.request import Request

R = TypeVar("R", bound=Request)

# Key of an older request -> its name now; both below `request`.
RENAMED = {
    "steer": "controls",
    "sampling.grid": "sampling.timesteps",
    "sampling.reuse": "sampling.cache_threshold",
    "sampling.guide": "sampling.signal_guidance",
    "sampling.rescale": "sampling.guidance_rescale",
    "sampling.interval": "sampling.guidance_interval",
    # Requests to pretrained weights were flat.
    "sampler": "sampling.sampler",
    "grid": "sampling.timesteps",
    "timesteps": "sampling.timesteps",
    "steps": "sampling.steps",
    "shift": "sampling.shift",
    "reuse": "sampling.cache_threshold",
    "cache_threshold": "sampling.cache_threshold",
    "image": "controls.image",
    "last_image": "controls.last_image",
    "control": "controls.control",
    "control_mask": "controls.control_mask",
    "reference": "controls.reference",
}


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """The weights of a run that drew the clips of a manifest."""

    workdir: str
    step: int  # of the checkpoint
    item: str  # "ema", the averaged weights, or "params"
    identity: str  # digest: equal for the same weights


@dataclasses.dataclass(frozen=True)
class PretrainedWeights:
    """The folder of pretrained weights that drew the clips of a manifest."""

    weights: str  # the folder
    identity: str  # digest: equal for the same weights


Weights = RunWeights | PretrainedWeights


def make_manifest(
    request: Request, weights: Weights | None, pixels_sha256: str, **more: Any
) -> dict[str, Any]:
    """Return the manifest of clips; `more` are further entries at its top level.

    weights: None for parameters in memory, whose clips cannot be made again from files.
    """
    # Deferred: vdx/__init__.py is the public API, which imports this module.
    from vdx import __version__

    manifest = {
        "request": dataclasses.asdict(request),
        "weights": None if weights is None else dataclasses.asdict(weights),
        "versions": {
            "vdx": __version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
        "pixels_sha256": pixels_sha256,
        **more,
    }
    # The values that a file has: tuples are lists.
    return json.loads(json.dumps(manifest))


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest in a JSON file.

    Raises ValueError for a file that is no JSON, ConfigError as `check_manifest` does.
    """
    manifest = read_json(path)
    check_manifest(manifest, str(path))
    return manifest


def check_manifest(manifest: Any, where: str) -> None:
    """Raise ConfigError for a value that is no manifest, or has a renamed key."""
    if not _is_manifest(manifest):
        raise ConfigError(
            f"{where} is not a manifest of vdx.sample: expected a JSON object with the keys "
            "request, which has a list of prompts, and weights."
        )
    check_renamed_keys(manifest["request"], RENAMED, "request", where)


def _is_manifest(value: Any) -> bool:
    """Return whether a JSON value has the parts of a manifest, whatever their keys."""
    if not isinstance(value, Mapping) or not {"request", "weights"} <= set(value):
        return False
    if not isinstance(value["weights"], Mapping | None):
        return False
    request = value["request"]
    prompts = request.get("prompts") if isinstance(request, Mapping) else None
    if not isinstance(prompts, list | tuple) or not prompts:
        return False
    return value.get("index", 0) in range(len(prompts))


def manifest_request(manifest: Mapping[str, Any], kind: type[R]) -> R:
    """Return the request of a manifest.

    Raises ConfigError for keys that `kind` lacks, and for values of another type.
    """
    request = fill(kind, manifest["request"], "manifest.request")
    for name, value in request.controls.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str) or name == "motion" for one in values):
            raise ConfigError(f"manifest.request.controls.{name} = {value!r:.80} is no file.")
    return request


def manifest_weights(manifest: Mapping[str, Any], kind: type[Any]) -> Any:
    """Return the record of the weights, a RunWeights or PretrainedWeights.

    Raises ConfigError for weights of the other kind.
    """
    if manifest["weights"] is None:
        raise ConfigError("The manifest names no weights: its clips are of weights in memory.")
    return fill(kind, manifest["weights"], "manifest.weights")


def check_weights(made: Weights, opened: Weights, where: str) -> None:
    """Raise ConfigError if opened weights are not those that made the clips."""
    if made.identity != opened.identity:
        raise ConfigError(
            f"The weights in {where} are not those of the manifest; the clip "
            "cannot be made again from them."
        )
