"""Compare the video VAE with `AutoencoderKLWan` of diffusers, on a CPU.

    python benchmarks/vae_decode.py --runs=11 --out=benchmarks/vae_decode.json

Both have the same random weights, float32, written by diffusers and read by vdx.interop. vdx runs
on the whole clip, and in chunks of one latent frame. The numbers are median seconds of runs in
turns, without compiling, which is a column of its own, and the memory that a call adds to the
weights and the input. torch takes as many threads as OMP_NUM_THREADS, XLA as many as the process
may run on.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import diffusers
import jax
import numpy as np
import torch
from absl import app, flags
from side_by_side import Way, compare, report, torch_threads, where

from vdx.interop.components import open_component
from vdx.parallel import MeshSpec
from vdx.types import Array, Params

FLAGS = flags.FLAGS
COLUMNS = {
    "what": "",
    "way": "",
    "seconds": ".3f",
    "over torch": ".2f",
    "MiB": ".0f",
    "compile": ".1f",
    "error": ".1e",
}
CHANNELS = 16  # of the latents
# A latent frame is 4 frames of 8 x 8 pixels; the first is one frame.
RATE_T = 4
RATE_HW = 8


class Pair:
    """A reference, and the VAE of vdx with its weights."""

    def __init__(self, base_dim: int) -> None:
        torch.manual_seed(0)
        self.torch = diffusers.AutoencoderKLWan(base_dim=base_dim).eval().requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            self.torch.save_pretrained(folder)
            component = open_component("vae", folder, "float32")
            self.vae = component.module
            self.params = component.load(MeshSpec().make())

    def vdx_way(self, method: str, x: np.ndarray, chunk: int | None) -> tuple[Way, float]:
        """Compile encode or decode; return it and the seconds to compile."""

        def call(params: Params, x: Array) -> Array:
            y = self.vae.apply({"params": params}, x, chunk, method=method)
            return y.mean if method == "encode" else y

        start = time.perf_counter()
        compiled = jax.jit(call).lower(self.params, x).compile()
        seconds = time.perf_counter() - start
        return lambda: np.asarray(compiled(self.params, x)), seconds

    def torch_way(self, method: str, x: np.ndarray) -> Way:
        """Return encode or decode of the reference, whose latents are not normalised."""
        if method == "decode":
            x = x * np.float32(self.vae.latents_std) + np.float32(self.vae.latents_mean)
        tensor = torch.from_numpy(x).movedim(-1, 1).contiguous()

        def encode() -> np.ndarray:
            return self.torch.encode(tensor).latent_dist.mean.movedim(1, -1).numpy()

        def decode() -> np.ndarray:
            return self.torch.decode(tensor).sample.movedim(1, -1).numpy()

        return encode if method == "encode" else decode

    def rows(self, method: str, x: np.ndarray, runs: int) -> list[dict[str, Any]]:
        """Return the rows of encode or decode."""
        whole, whole_compile = self.vdx_way(method, x, None)
        chunked, chunked_compile = self.vdx_way(method, x, 1)
        ways = {"torch": self.torch_way(method, x), "vdx": whole, "vdx, in pieces": chunked}
        compile_seconds = dict(zip(ways, (0.0, whole_compile, chunked_compile), strict=True))

        # The reference clips its frames to [-1, 1].
        want = ways["torch"]()
        errors = {}
        for name, way in ways.items():
            got = np.clip(way(), -1, 1) if method == "decode" else way()
            errors[name] = float(np.abs(got - want).max())

        # Times and memory.
        found = compare(ways, runs)
        rows = []
        for name, measured in found.items():
            rows.append(
                {
                    "what": method,
                    "way": name,
                    "seconds": measured.seconds,
                    "over torch": measured.seconds / found["torch"].seconds,
                    "MiB": measured.mib,
                    "compile": compile_seconds[name],
                    "error": errors[name],
                }
            )
        return rows


def main(argv: Sequence[str]) -> None:
    del argv
    torch.set_num_threads(torch_threads())
    pair = Pair(FLAGS.base_dim)

    # A clip of pixels, and latents of a clip of that size.
    rng = np.random.default_rng(0)
    frames = FLAGS.frames
    side = FLAGS.side
    latent_shape = (1, 1 + (frames - 1) // RATE_T, side // RATE_HW, side // RATE_HW, CHANNELS)
    latents = rng.normal(size=latent_shape).astype(np.float32)
    video = np.tanh(rng.normal(size=(1, frames, side, side, 3))).astype(np.float32)

    rows = pair.rows("decode", latents, FLAGS.runs) + pair.rows("encode", video, FLAGS.runs)

    measured_on = where(
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        torch_threads=str(torch.get_num_threads()),
    )
    facts = {
        "base_dim": FLAGS.base_dim,
        "frames": frames,
        "side": side,
        "runs": FLAGS.runs,
        "rows": rows,
    }
    report(Path(FLAGS.out), measured_on | facts, COLUMNS)


if __name__ == "__main__":
    flags.DEFINE_string("out", "benchmarks/vae_decode.json", "The .json file to write.")
    flags.DEFINE_integer("base_dim", 32, "Channels of the first level; the pretrained VAE has 96.")
    flags.DEFINE_integer("frames", 17, "Frames of the clip, 1 + 4n.")
    flags.DEFINE_integer("side", 128, "Pixels of a side, a multiple of 8.")
    flags.DEFINE_integer("runs", 5, "Runs of each way.", lower_bound=1)
    app.run(main)
