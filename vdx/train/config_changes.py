"""Keys of a config that differ from those that a workdir was trained with.

Some keys decide what is learned. A run continues with other values of these only if the user
allows it, since a part of its weights would then belong to neither config.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from vdx.config.build import ConfigError, configurable_fields
from vdx.config.renamed import check_renamed_keys
from vdx.config.sections import DataSection, ExperimentSections, TrainSection
from vdx.data.pipeline import Loader
from vdx.data.sources import SOURCES
from vdx.data.transforms import ClipSampling
from vdx.diffusion.losses import LOSS_TERMS, WEIGHTINGS
from vdx.diffusion.process import PROCESSES
from vdx.diffusion.time_sampling import TIME_SAMPLERS
from vdx.files import read_json_object
from vdx.generate.generator import Sampling
from vdx.models.adapters.lora import Lora
from vdx.models.conditioning.table import SIGNALS
from vdx.models.denoiser import BACKBONES
from vdx.parallel import MeshSpec
from vdx.train.optim import Optimizer

__all__ = ["KeyChange", "check_config", "config_changes", "list_changes"]

# Keys that do not decide what is learned; each stands for all that is below it.
FREE = (
    "data.loader.max_bad_rate",
    "data.loader.prefetch",
    "data.loader.threads",
    "data.loader.workers",
    "data.path",
    "data.source.path",
    "data.validation",
    "eval",
    "init",
    "mesh",
    "model.backbone.attention",
    "model.backbone.context",
    "model.backbone.remat",
    "resume",
    "sample",
    "train",
    "weights",
)
LEARNED = ("train.ema",)  # exceptions from FREE

Contents = Callable[..., Any] | Mapping[str, Callable[..., Any]]

# Section -> the class of its fields, or a table: its row is the section's `name`.
SECTIONS: dict[str, Contents] = {
    "": ExperimentSections,
    "data": DataSection,
    "data.source": SOURCES,
    "data.clip": ClipSampling,
    "data.loader": Loader,
    "model.backbone": BACKBONES,
    **{f"model.signals.{name}": row for name, row in SIGNALS.items()},
    "process": PROCESSES,
    "time_sampler": TIME_SAMPLERS,
    **{f"loss.{name}": row for name, row in LOSS_TERMS.items()},
    "loss.denoising.weighting": WEIGHTINGS,
    "optim": Optimizer,
    "mesh": MeshSpec,
    "train": TrainSection,
    "sample": Sampling,
    "lora": Lora,
}


class KeyChange(NamedTuple):
    """A key with two values; None stands for a key that is not set."""

    key: str  # dotted, below `config`
    old: Any
    new: Any

    @property
    def is_learned(self) -> bool:
        """True if the key decides what is learned."""
        return _below(self.key, LEARNED) or not _below(self.key, FREE)

    def __str__(self) -> str:
        """Return a line for a message."""
        return f"config.{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[KeyChange]:
    """Return the keys whose values differ; a key that is left out has its default."""
    before = _flat_with_defaults(old)
    after = _flat_with_defaults(new)
    return [
        KeyChange(key, before.get(key), after.get(key))
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]


def check_config(workdir: Path, config: Mapping[str, Any], allow: bool) -> list[KeyChange]:
    """Return what differs from the config that a workdir was trained with.

    allow: keys that decide what is learned may differ too. Raises ConfigError for such a key if
    the workdir has a checkpoint, which the run would continue from, and what `read_json_object`
    raises.
    """
    path = workdir / "config.json"
    if not path.exists():
        return []
    old = read_json_object(path)
    check_renamed_keys(old, source=str(path))

    changes = config_changes(old, config)
    learned = [change for change in changes if change.is_learned]
    if learned and not allow and _has_checkpoint(workdir):
        raise ConfigError(
            f"{workdir} was trained with another config, and these keys decide what is learned:"
            f"{list_changes(learned)}\n"
            "Take another --workdir, set the keys back, or give --allow_config_change to continue "
            "its weights with the new values."
        )
    return changes


def list_changes(changes: Iterable[KeyChange]) -> str:
    """Return changes, a line each."""
    return "".join(f"\n  {change}" for change in changes)


def _has_checkpoint(workdir: Path) -> bool:
    """Return whether a run in the workdir has saved a step."""
    return any(path.name.isdigit() for path in workdir.glob("checkpoints/*"))


def _flat_with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return {dotted key: value} of a config, with the defaults that it omits."""
    tree = json.loads(json.dumps(config))  # a copy
    for section, contents in SECTIONS.items():
        node = tree
        for name in filter(None, section.split(".")):
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            continue
        row = contents.get(str(node.get("name"))) if isinstance(contents, Mapping) else contents
        if row is not None:
            node.update({**_defaults(row), **node})
    # As JSON has them: tuples are lists.
    return flatten_dict(json.loads(json.dumps(tree)), sep=".")


def _defaults(row: Any) -> dict[str, Any]:
    """Return the defaults of the fields that a config may set."""
    defaults = {}
    for field in dataclasses.fields(row):
        if field.name not in configurable_fields(row) or field.name == "seed":
            continue  # the seed of batches is that of the run
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def _below(key: str, keys: tuple[str, ...]) -> bool:
    """Return whether a dotted key is one of `keys`, or below one."""
    return any(f"{key}.".startswith(f"{name}.") for name in keys)


def _shown(value: Any) -> str:
    """Return a value as a message has it."""
    return "not set" if value is None else json.dumps(value)
