"""Training of a part of a network.

A regex selects the parameters that are learned; the rest stays as it was read.
"""

import dataclasses
import re
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from vdx.config.build import ConfigError
from vdx.types import Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The parameters whose paths a regex matches."""

    pattern: str  # searched for in paths such as "network/up_0_1/motion/proj_in/kernel"

    def check(self, shapes: Params) -> None:
        """Raise ConfigError for a pattern that selects no part.

        It is no regex, or it matches nothing or everything.
        """
        try:
            frozen, trained = self.split(shapes)
        except re.error as error:
            raise ConfigError(
                f"config.trainable = {self.pattern!r} is no regex: {error}."
            ) from error
        if not trained or not frozen:
            found = "finds none" if not trained else "finds all"
            layers = sorted({path.rpartition("/")[0] for path in _flat(shapes)})
            raise ConfigError(
                f"config.trainable = {self.pattern!r} {found} of the parameters. To "
                "train all of them leave it out. They are in:\n  " + "\n  ".join(layers)
            )

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return (frozen, trained) parameters."""
        frozen: dict[str, Any] = {}
        trained: dict[str, Any] = {}
        for path, leaf in _flat(params).items():
            if re.search(self.pattern, path):
                trained[path] = leaf
            else:
                frozen[path] = leaf
        return unflatten_dict(frozen, sep="/"), unflatten_dict(trained, sep="/")

    def combine(self, frozen: Params, trained: Params, key: PRNGKeyArray | None = None) -> Params:
        """Return the whole network.

        `key` is not used; `Lora.combine` has the same signature.
        """
        return overlay(frozen, trained)


def overlay(params: Params, others: Params) -> Params:
    """Return both trees in one; a leaf that both have is that of `others`."""
    return unflatten_dict({**_flat(params), **_flat(others)}, sep="/")


def _flat(tree: Params) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")
