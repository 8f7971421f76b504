"""Comparison of the encoders of a model with those that made cached data."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from vdx.files import read_json_object
from vdx.interop.components import Component, open_component
from vdx.interop.keymap import WeightsError, listed
from vdx.interop.wan_original import open_part

__all__ = ["check_encoders"]

ENCODERS = ("vae", "text_encoder", "image_encoder")
SHOWN = 12  # digits of an identity in messages


def check_encoders(weights: str | tuple[str, ...] | None, made_by: Mapping[str, str]) -> None:
    """Raise WeightsError if other encoders than a model's made cached data.

    weights: its transformer, its folder, or a run that started from it. made_by: encoder -> its
    identity, from the metadata of the data. What is not next to the weights, or not in the
    metadata, is not compared.
    """
    paths = (weights,) if isinstance(weights, str) else weights or ()
    problems = []
    for path in paths:
        problems += _differences(Path(path).absolute(), tuple(sorted(made_by.items())))
    if problems:
        head = (
            f"The cached data were made by other encoders than those of {weights}. Make them again "
            "with vdx.prepare --until=latents --weights=FOLDER, or name the model that made them. "
            "Different are:"
        )
        raise WeightsError(listed(head, problems))


@functools.cache
def _differences(path: Path, made_by: tuple[tuple[str, str], ...]) -> list[str]:
    """List the encoders near `path` that are not those of the data."""
    problems = []
    for name, identity in made_by:
        if name not in ENCODERS:
            continue
        found = next(_encoders_near(path, name), None)
        if found is not None and found.identity() != identity:
            problems.append(
                f"{name}: {found.identity()[:SHOWN]}, that of the data is {identity[:SHOWN]}"
            )
    return problems


def _encoders_near(path: Path, name: str) -> Iterator[Component]:
    """Yield the encoders `name` of the model that a transformer belongs to."""
    for folder in (path, path.parent):
        if (folder / name / "config.json").is_file():
            yield open_component(name, folder / name, "float32")
        elif folder.is_dir():
            part = open_part(name, folder)
            if part is not None:
                yield part

    # A run: the model that it started from.
    if (path / "checkpoints").is_dir():
        origin = read_json_object(path / "config.json").get("weights")
        if isinstance(origin, str) and origin:
            yield from _encoders_near(Path(origin).absolute(), name)
