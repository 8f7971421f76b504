"""Pipelines: clips for prompts, from a run or from pretrained weights."""

import abc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from vdx.generate.clip import Clip, iter_uint8_frames
from vdx.generate.manifest import Weights, check_manifest, check_weights, make_manifest
from vdx.generate.manifest import read_manifest as read_manifest
from vdx.generate.request import Request

R = TypeVar("R", bound=Request)


class Pipeline(abc.ABC, Generic[R]):
    """Draws clips from one set of weights; `vdx.load` opens one.

    A subclass completes and checks requests, and streams the frames of their clips.
    """

    where: str  # the workdir or folder, for messages

    @overload
    def __call__(self, prompts: str, *, seed: int = 0, **settings: Any) -> Clip: ...

    @overload
    def __call__(self, prompts: Sequence[str], *, seed: int = 0, **settings: Any) -> list[Clip]: ...

    def __call__(
        self, prompts: str | Sequence[str], *, seed: int = 0, **settings: Any
    ) -> Clip | list[Clip]:
        """Draw a clip for a prompt, or a list of clips for a list; clip i takes seed + i.

        settings: num_frames, fps, steps, guidance, image and whatever else the model takes; a
        setting that is left out, or None, has the model's default. Raises ConfigError for a
        setting that the model does not take, with the nearest known name.
        """
        if isinstance(prompts, str):
            return self.draw(self.request([prompts], seed=seed, **settings))[0]
        return self.draw(self.request(prompts, seed=seed, **settings))

    @abc.abstractmethod
    def request(self, prompts: Sequence[str], *, seed: int = 0, **settings: Any) -> R:
        """Complete a request with the model's defaults and check it; reads nothing large.

        Raises ConfigError for what the model cannot draw.
        """

    @abc.abstractmethod
    def manifest_request(self, manifest: Mapping[str, Any], **moved: Any) -> R:
        """Return the checked request of a manifest.

        moved: new paths of its input files.
        """

    @abc.abstractmethod
    def manifest_weights(self, manifest: Mapping[str, Any]) -> Weights:
        """Return the record of the weights in a manifest of this kind of model."""

    @abc.abstractmethod
    def weights(self) -> Weights | None:
        """Return the record of the weights; None if they are of no file."""

    @abc.abstractmethod
    def stream(self, request: R, *, exact: bool = False) -> Iterator[Iterator[np.ndarray]]:
        """Yield the clips of a request, each an iterator over pieces [t h w 3].

        Pieces are uint8, or float32 in [-1, 1]; `exact` makes them float32. A clip must be used up
        before the next. Every process of a mesh must iterate.
        """

    def draw(self, request: R) -> list[Clip]:
        """Draw the clips of a request."""
        weights = self.weights()
        clips = []
        for i, pieces in enumerate(self.stream(request)):
            frames = np.stack(list(iter_uint8_frames(pieces)))
            digest = hashlib.sha256(frames.tobytes()).hexdigest()
            # Clips of one request share programs and, with some samplers, noise: the manifest
            # holds the whole request, and `index` is the number of this clip in it.
            index = {"index": i} if len(request.prompts) > 1 else {}
            manifest = make_manifest(request, weights, digest, **index)
            clips.append(Clip(frames, request.fps, request.prompts[i], request.seeds[i], manifest))
        return clips

    def remake(self, manifest: Mapping[str, Any] | str | Path, **moved: Any) -> Clip | list[Clip]:
        """Make the clip or the clips of a manifest again, bit for bit on the same machine.

        manifest: `clip.manifest`, or the path of its file. moved: new paths of input files, such
        as image="here.png". Raises ConfigError for other weights or files than the manifest's.
        """
        if isinstance(manifest, str | Path):
            manifest = read_manifest(manifest)
        request = self.restore(manifest, **moved)
        clips = self.draw(request)
        if "index" in manifest:
            return clips[manifest["index"]]
        return clips[0] if len(clips) == 1 else clips

    def restore(self, manifest: Mapping[str, Any], **moved: Any) -> R:
        """Return the request of a manifest after checks that it can be drawn again here.

        Raises ConfigError for other weights or files than the manifest's.
        """
        check_manifest(manifest, "The manifest")
        request = self.manifest_request(manifest, **moved)
        made = self.manifest_weights(manifest)
        opened = self.weights()
        if opened is not None:
            check_weights(made, opened, self.where)
        return request
