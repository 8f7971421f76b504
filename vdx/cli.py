"""Flags as values: what an entry point's text flags mean."""

from collections.abc import Callable
from typing import Any, TypeVar

from absl import app, flags

T = TypeVar("T")

FLAGS = flags.FLAGS
MAPS = ("depth", "pose", "flow")  # the dense maps of --control


def given_flags(*names: str) -> dict[str, Any]:
    """Return the values of those flags that were given."""
    values = {name: getattr(FLAGS, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def parse_mesh(text: str | None) -> dict[str, int] | None:
    """Return the sizes of a mesh such as fsdp=4,tensor=2. Raises UsageError."""
    return _parse_numbers("mesh", text, int, "fsdp=4,tensor=2")


def parse_guidance(text: str | None) -> float | tuple[float, ...] | None:
    """Return one scale, or a tuple for two experts. Raises UsageError."""
    if not text:
        return None
    try:
        scales = tuple(float(scale) for scale in text.split(","))
    except ValueError as error:
        raise app.UsageError(
            f"--guidance={text} is not a number, or two with a comma between them."
        ) from error
    return scales if len(scales) > 1 else scales[0]


def parse_signal_guidance(text: str | None) -> dict[str, float] | None:
    """Return guidance scales by signal, such as depth=2,flow=1.5. Raises UsageError."""
    return _parse_numbers("signal_guidance", text, float, "depth=2,flow=1.5")


def _parse_numbers(
    flag: str, text: str | None, kind: Callable[[str], T], example: str
) -> dict[str, T] | None:
    """Return the numbers of a flag by name. Raises UsageError that shows the example."""
    if not text:
        return None
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name: kind(number) for name, number in pairs}
    except ValueError as error:
        raise app.UsageError(f"--{flag}={text} is not like {example}.") from error


def parse_control_maps(text: str | None) -> dict[str, str]:
    """Return files by map, such as depth=FILE,pose=FILE. Raises UsageError."""
    maps = {}
    for part in parse_list(text) or ():
        name, _, path = part.partition("=")
        if name not in MAPS or not path:
            raise app.UsageError(f"--control={part} is not like depth=FILE or pose=FILE.")
        maps[name] = path
    return maps


def parse_list(text: str | None) -> tuple[str, ...] | None:
    """Return the parts of a flag that are separated by commas."""
    return tuple(text.split(",")) if text else None
