"""Requests: everything but the weights that decides a set of clips."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

from vdx.config.build import ConfigError, nearest
from vdx.config.ranges import Count, Positive, Seed
from vdx.files import FileError, open_regular


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A request to a trained model, and what requests to every model share.

    Every value is a JSON value or a tuple, so that a manifest holds the request.
    """

    prompts: tuple[str, ...]  # one clip for each
    seed: Seed  # clip i starts from the noise of seed + i
    num_frames: Count  # pixel frames of a clip
    fps: Positive  # frames per second of the clip; some models read it
    sampling: dict[str, Any]  # fields of vdx.generate.generator.Sampling
    # Conditions other than the text, by the name of their flag: paths, names or numbers.
    controls: dict[str, Any] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)  # SHA-256 of each input file

    @property
    def seeds(self) -> list[int]:
        """The seed of each clip; after the largest comes 0."""
        return [(self.seed + i) % 2**64 for i in range(len(self.prompts))]

    def input_files(self) -> dict[str, str]:
        """Return {name: path} of the files that the request reads."""
        files: dict[str, str] = {}
        for name, value in self.controls.items():
            if isinstance(value, list):
                files |= {f"{name} {i}": path for i, path in enumerate(value)}
            elif is_file(name, value):
                files[name] = value
        return files

    def with_digests(self) -> Self:
        """Return the request with the digest of every input file. Raises ConfigError."""
        digests = {name: file_digest(name, path) for name, path in self.input_files().items()}
        return dataclasses.replace(self, digests=digests)

    def check_files(self) -> None:
        """Raise ConfigError if an input file has changed since the request was made."""
        for name, path in self.input_files().items():
            if file_digest(name, path) != self.digests.get(name):
                raise ConfigError(
                    f"{name} = {path} is not the file of the request; give the right "
                    f"one by --{name.split()[0]}."
                )

    def relocated(self, moved: Mapping[str, Any]) -> Self:
        """Return the request with input files at other paths.

        Raises ConfigError for a file that the request does not read.
        """
        files = {name.split()[0] for name in self.input_files()}
        new = [name for name in moved if name not in files]
        if new:
            raise ConfigError(f"The manifest's clip has no {', '.join(new)}.")
        controls = {name: value for name, value in moved.items() if name in self.controls}
        fields = {name: value for name, value in moved.items() if name not in self.controls}
        return dataclasses.replace(self, controls={**self.controls, **controls}, **fields)


def is_file(name: str, value: Any) -> bool:
    """Return whether a control is a file, not a number or names of actions."""
    return isinstance(value, str) and (name != "actions" or value.endswith(".json"))


def file_digest(name: str, path: str) -> str:
    """Return the SHA-256 of a file. Raises ConfigError that names the flag `name`."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"--{name}={path} cannot be read: {error.strerror}.") from error
    except FileError as error:
        raise ConfigError(f"--{name}: {error}") from error


def check_settings(
    settings: Iterable[str], known: Iterable[str], model: str, ignore: Iterable[str] = ()
) -> None:
    """Raise ConfigError for a setting that a kind of model does not take.

    ignore: settings that are accepted, and that the message does not list.
    """
    known = sorted(known)
    for name in settings:
        if name not in known and name not in ignore:
            raise ConfigError(
                f"Unknown setting {name!r}.{nearest(name, known)} {model} takes: "
                f"{', '.join(known)}."
            )
