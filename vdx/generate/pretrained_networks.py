"""The networks of a pretrained model on a mesh, one at a time."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vdx.interop.components import Component
from vdx.models.encoders.clip import Features
from vdx.models.vae.video_vae import VideoVAE
from vdx.types import Array, Params

__all__ = ["Arrays", "Log", "PretrainedNetworks", "chunks"]

Log = Callable[[str], None]
Arrays = dict[str, np.ndarray]


class PretrainedNetworks:
    """Reads the networks of a model onto a mesh and compiles calls of them.

    A network stays on the mesh as long as the function that evaluates it. Results are whole on
    every process.
    """

    def __init__(self, components: Mapping[str, Component], mesh: Mesh, log: Log = print) -> None:
        """log: receives a line with the time of each thing that is done."""
        self.components = components
        self.mesh = mesh
        self.log = log

    def text_encoder(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Read the text encoder; return encode(ids [b l], mask [b l]) -> features [b l d]."""
        params = self.load("text_encoder")

        def features(apply: Any, ids: Array, mask: Array) -> Array:
            found = apply(ids, mask)
            if not isinstance(found, Features):  # of T5
                return found
            assert found.last is not None  # of CLIP's text
            return found.last

        encode = self.compile_call("text_encoder", features)
        return lambda ids, mask: np.asarray(encode(params, ids, mask))

    def video_encoder(self, chunk: int) -> Callable[[np.ndarray], np.ndarray]:
        """Read the VAE; return encode(video [b t h w 3]) -> the modes of its latents.

        chunk: latent frames that a video VAE computes at once; an image VAE has all at once.
        """
        params = self.load("vae")
        pieces = (chunk,) if isinstance(self.components["vae"].module, VideoVAE) else ()
        encode = self.compile_call(
            "vae", lambda apply, x: apply(x, *pieces, method="encode").mode()
        )
        return lambda video: np.asarray(encode(params, video))

    def image_encoder(self) -> Callable[[np.ndarray], np.ndarray]:
        """Read CLIP; return encode(pixels [b h w 3]) -> the last layer but one [b m d]."""
        params = self.load("image_encoder")
        encode = self.compile_call("image_encoder", lambda apply, x: apply(x).penultimate)
        return lambda pixels: np.asarray(encode(params, pixels))

    def load(self, name: str) -> Params:
        """Read a network onto the mesh."""
        component = self.components[name]
        start = time.perf_counter()
        params = component.load(self.mesh)
        self.log_time(f"{name}: {component.size / 1e6:,.1f}M parameters read", start)
        return params

    def compile_call(self, name: str, call: Callable[..., Array]) -> Callable[..., Array]:
        """Compile (params, *arrays) -> call(apply, *arrays).

        `apply` is that of the component `name` with the parameters.
        """
        module = self.components[name].module

        def run(params: Params, *args: Array) -> Array:
            def apply(*args: Any, **options: Any) -> Any:
                return module.apply({"params": params}, *args, **options)

            return call(apply, *args)

        return self.jit(run)

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function whose results are whole on every device."""
        return jax.jit(function, out_shardings=jax.sharding.PartitionSpec())

    def log_time(self, line: str, start: float) -> None:
        """Log what was done since `start`."""
        self.log(f"{line} ({time.perf_counter() - start:.1f} s)")


def chunks(count: int, size: int) -> list[np.ndarray]:
    """Return the indices 0 .. count - 1, `size` at a time; repetition fills the last."""
    return [
        np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)
    ]
