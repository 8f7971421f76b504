"""Sampling end to end against the denoising loop of diffusers' `WanPipeline`, on a CPU.

    python benchmarks/sampling.py --runs=7 --out=benchmarks/sampling.json

A Wan transformer of random weights, float32, saved by diffusers and read by vdx.interop; 20 steps
with guidance, Euler's method on the same grid; from the same text features and noise to latents.
torch runs eagerly, in the loop of the pipeline: scheduler, and one forward pass for each
condition. vdx is one program, with keys and values of the text computed before the loop, and in
every step ("told each step"). Median seconds of runs in turns; the first call of vdx, which
compiles, is a column of its own.
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

from vdx.diffusion.process import RectifiedFlow
from vdx.generate.generator import Generator, Sampling
from vdx.interop.components import open_component
from vdx.models.denoiser import Denoiser
from vdx.parallel import MeshSpec

FLAGS = flags.FLAGS
COLUMNS = {
    "width": "",
    "layers": "",
    "tokens": ",",
    "words": "",
    "way": "",
    "seconds": ".3f",
    "over torch": ".2f",
    "MiB": ",.0f",
    "first call": ".2f",
    "error": ".0e",
}
# width, layers, heads, latents [t h w c], of which a token is 1 x 2 x 2, tokens of text: Wan
# reads 512, however short the caption is.
SIZES = {
    "small": (64, 2, 2, (1, 16, 16, 16), 32),
    "small_512": (64, 2, 2, (1, 16, 16, 16), 512),
    "medium": (256, 6, 4, (5, 32, 32, 16), 512),
}
STEPS, GUIDANCE, SHIFT, TEXT = 20, 5.0, 3.0, 64


class Both:
    """A transformer in torch, and ours with its weights."""

    def __init__(self, width: int, layers: int, heads: int, shape: tuple[int, ...], words: int):
        torch.manual_seed(0)
        self.torch = diffusers.WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=16,
            out_channels=16,
            text_dim=TEXT,
            freq_dim=256,
            ffn_dim=4 * width,
            num_layers=layers,
        )
        self.torch = self.torch.eval().requires_grad_(False)
        for parameter in self.torch.parameters():
            parameter.copy_(
                0.5 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5
                if parameter.ndim > 1
                else 1 + 0.1 * torch.randn_like(parameter)
            )
        with tempfile.TemporaryDirectory() as folder:
            self.torch.save_pretrained(folder)
            component = open_component("transformer", folder, "float32")
            self.params = component.load(MeshSpec().make())
        signals = {
            name: {**spec, "length": words} if name == "embeddings" else spec
            for name, spec in component.module.signals.items()
        }
        self.generator = Generator(
            component.module.clone(signals=signals),
            RectifiedFlow(),
            Sampling("euler", STEPS, GUIDANCE, timesteps="diffusers_euler", shift=SHIFT, batch=1),
            shape[1:],
        )
        rng = np.random.default_rng(0)
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        self.noise, self.text = normal(1, *shape), normal(2, words, TEXT)

    def theirs(self) -> np.ndarray:
        """The loop of WanPipeline.__call__ without what is before and after it."""
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        scheduler.set_timesteps(STEPS)
        x = torch.from_numpy(self.noise).movedim(-1, 1).contiguous()
        text, negative = torch.from_numpy(self.text).split(1)
        with torch.no_grad():
            for t in scheduler.timesteps:
                told, untold = (
                    self.torch(
                        hidden_states=x,
                        timestep=t.expand(1),
                        return_dict=False,
                        encoder_hidden_states=words,
                    )[0]
                    for words in (text, negative)
                )
                guided_denoiser = untold + GUIDANCE * (told - untold)
                x = scheduler.step(guided_denoiser, t, x, return_dict=False)[0]
        return x.movedim(1, -1).numpy()

    def ours(self, told: bool = True):
        """(run, seconds of the first call)"""
        text = {"text": self.text[:1], "text_mask": np.ones((1, self.text.shape[1]), bool)}
        negative = text | {"text": self.text[1:]}
        generator, rows = self.generator, self.generator.step_table()
        method = Denoiser.precompute_cross_kv
        if not told:
            Denoiser.precompute_cross_kv = lambda self, *args, **more: {}

        @jax.jit
        def draw(params, text, negative, noise):
            return generator.run_steps(
                params, text, negative, generator.start(noise), rows, jax.random.key(0)
            )[0][0]

        run = lambda: np.asarray(draw(self.params, text, negative, self.noise))
        start = time.perf_counter()
        run()
        Denoiser.precompute_cross_kv = method
        return run, time.perf_counter() - start


def measured(size: str, runs: int) -> list[dict]:
    width, layers, _, shape, words = SIZES[size]
    both = Both(*SIZES[size])
    ours, first = both.ours()
    each, each_first = both.ours(cross_kv=False)
    ways = {"torch": both.theirs, "vdx": ours, "vdx, told each step": each}
    firsts = {"torch": 0.0, "vdx": first, "vdx, told each step": each_first}
    want = both.theirs()
    errors = {name: float(np.abs(way() - want).max()) for name, way in ways.items()}
    found = compare(ways, runs)
    tokens = shape[0] * shape[1] * shape[2] // 4
    return [
        {
            "width": width,
            "layers": layers,
            "tokens": tokens,
            "words": words,
            "way": name,
            "seconds": row["seconds"],
            "MiB": row["mib"],
            "over torch": row["seconds"] / found["torch"]["seconds"],
            "first call": firsts[name],
            "error": errors[name],
        }
        for name, row in found.items()
    ]


def main(argv):
    del argv
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    rows = [row for size in FLAGS.sizes for row in measured(size, FLAGS.runs)]
    report(
        Path(FLAGS.out),
        {
            **where(
                torch=torch.__version__,
                diffusers=diffusers.__version__,
                torch_threads=str(torch.get_num_threads()),
            ),
            "steps": STEPS,
            "guidance": GUIDANCE,
            "runs": FLAGS.runs,
            "rows": rows,
        },
        COLUMNS,
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", "benchmarks/sampling.json", "A .json file.")
    flags.DEFINE_multi_enum("sizes", list(SIZES), list(SIZES), "Of the transformer.")
    flags.DEFINE_integer("runs", 5, "Of each way.", lower_bound=1)
    app.run(main)
