"""Training a part of a network: what a regex finds is learned, the rest stays as it was read."""

import dataclasses
import re
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from vdx.config.build import ConfigError
from vdx.types import Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The parameters whose paths, such as "network/up_0_1/motion/proj_in/kernel", a regex finds."""

    pattern: str

    def check(self, shapes: Params) -> None:
        """Raises ConfigError for a pattern that is no regex, or finds nothing or everything."""
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
        """(frozen, trained) parameters."""
        halves: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        for path, leaf in _flat(params).items():
            halves[bool(re.search(self.pattern, path))][path] = leaf
        frozen, trained = (unflatten_dict(half, sep="/") for half in halves)
        return frozen, trained

    def combine(self, frozen: Params, trained: Params, key: PRNGKeyArray | None = None) -> Params:
        """The whole network, with what is trained in its place."""
        return overlaid(frozen, trained)


def overlaid(params: Params, others: Params) -> Params:
    """Both trees in one; `others` where both have a parameter."""
    return unflatten_dict({**_flat(params), **_flat(others)}, sep="/")


def _flat(tree: Params) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")
