"""Flags as values: what an entry point's text flags mean."""

from typing import Any

from absl import app, flags

FLAGS = flags.FLAGS
MAPS = ("depth", "pose", "flow")  # the dense maps of --control


def given_flags(*names: str) -> dict[str, Any]:
    """Return the values of those flags that were given."""
    values = {name: getattr(FLAGS, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def parse_mesh(text: str | None) -> dict[str, int] | None:
    """Return the sizes of a mesh such as fsdp=4,tensor=2. Raises UsageError."""
    if not text:
        return None
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {axis: int(size) for axis, size in pairs}
    except ValueError as error:
        raise app.UsageError(f"--mesh={text} is not like fsdp=4,tensor=2.") from error


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
    if not text:
        return None
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name: float(scale) for name, scale in pairs}
    except ValueError as error:
        raise app.UsageError(f"--signal_guidance={text} is not like depth=2,flow=1.5") from error


def parse_control_maps(text: str | None) -> dict[str, str]:
    """Return files by map, such as depth=FILE,pose=FILE. Raises UsageError."""
    maps = {}
    for part in text.split(",") if text else []:
        name, _, path = part.partition("=")
        if name not in MAPS or not path:
            raise app.UsageError(f"--control={part} is not like depth=FILE or pose=FILE.")
        maps[name] = path
    return maps


def parse_list(text: str | None) -> tuple[str, ...] | None:
    """Return the parts of a flag that are separated by commas."""
    return tuple(text.split(",")) if text else None
