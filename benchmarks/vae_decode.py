"""The video VAE against `AutoencoderKLWan` of diffusers with the same weights, on a CPU.

    python benchmarks/vae_decode.py --runs=11 --out=benchmarks/vae_decode.json

Random weights, float32, written by diffusers and read by vdx.interop. vdx whole and in pieces of
one latent frame; median seconds of runs in turns, without compiling, which is a column of its
own; memory beside the weights and the input. torch takes as many threads as OMP_NUM_THREADS
says, XLA as many as the process may run on.
"""

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import diffusers
import jax
import numpy as np
import torch
from absl import app, flags
from side_by_side import compare, report, where

from vdx.interop.components import open_component
from vdx.parallel import MeshSpec

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
Z = 16


def numpy(x: torch.Tensor) -> np.ndarray:
    return x.movedim(1, -1).numpy()


class Both:
    """A reference, and ours with its weights."""

    def __init__(self, base_dim: int):
        torch.manual_seed(0)
        self.torch = diffusers.AutoencoderKLWan(base_dim=base_dim).eval().requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            self.torch.save_pretrained(folder)
            component = open_component("vae", folder, "float32")
            self.vae = component.module
            self.params = component.load(MeshSpec().make())
        self.mean, self.std = (
            np.float32(getattr(self.vae, f"latents_{k}")) for k in ("mean", "std")
        )

    def ours(self, method: str, x: np.ndarray, chunk: int | None):
        """(run, seconds to compile)"""

        def call(params, x):
            y = self.vae.apply({"params": params}, x, chunk, method=method)
            return y.mean if method == "encode" else y

        start = time.perf_counter()
        compiled = jax.jit(call).lower(self.params, x).compile()
        seconds = time.perf_counter() - start
        return lambda: np.asarray(compiled(self.params, x)), seconds

    def theirs(self, method: str, x: np.ndarray):
        first = torch.from_numpy(x if method == "encode" else x * self.std + self.mean)
        first = first.movedim(-1, 1).contiguous()
        if method == "encode":
            return lambda: numpy(self.torch.encode(first).latent_dist.mean)
        return lambda: numpy(self.torch.decode(first).sample)

    def rows(self, method: str, x: np.ndarray, runs: int) -> list[dict]:
        theirs = self.theirs(method, x)
        whole, whole_seconds = self.ours(method, x, None)
        pieces, pieces_seconds = self.ours(method, x, 1)
        ways = {"torch": theirs, "vdx": whole, "vdx, in pieces": pieces}
        compiling = {"torch": 0.0, "vdx": whole_seconds, "vdx, in pieces": pieces_seconds}
        clip = (lambda y: np.clip(y, -1, 1)) if method == "decode" else (lambda y: y)
        want = theirs()
        errors = {name: float(np.abs(clip(way()) - want).max()) for name, way in ways.items()}
        found = compare(ways, runs)
        return [
            {
                "what": method,
                "way": name,
                "seconds": row["seconds"],
                "over torch": row["seconds"] / found["torch"]["seconds"],
                "MiB": row["mib"],
                "compile": compiling[name],
                "error": errors[name],
            }
            for name, row in found.items()
        ]


def main(argv):
    del argv
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    both, rng = Both(FLAGS.base_dim), np.random.default_rng(0)
    t, side = 1 + (FLAGS.frames - 1) // 4, FLAGS.side
    latents = rng.normal(size=(1, t, side // 8, side // 8, Z)).astype(np.float32)
    video = np.tanh(rng.normal(size=(1, FLAGS.frames, side, side, 3))).astype(np.float32)
    rows = both.step_table("decode", latents, FLAGS.runs) + both.step_table(
        "encode", video, FLAGS.runs
    )
    report(
        Path(FLAGS.out),
        {
            **where(
                torch=torch.__version__,
                diffusers=diffusers.__version__,
                torch_threads=str(torch.get_num_threads()),
            ),
            "base_dim": FLAGS.base_dim,
            "frames": FLAGS.frames,
            "side": side,
            "runs": FLAGS.runs,
            "rows": rows,
        },
        COLUMNS,
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", "benchmarks/vae_decode.json", "A .json file.")
    flags.DEFINE_integer("base_dim", 32, "Channels of the first level; the public VAE has 96.")
    flags.DEFINE_integer("frames", 17, "1 + 4n.")
    flags.DEFINE_integer("side", 128, "Pixels, a multiple of 8.")
    flags.DEFINE_integer("runs", 5, "Of each way.", lower_bound=1)
    app.run(main)
