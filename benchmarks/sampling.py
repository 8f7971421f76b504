"""Compare sampling with the denoising loop of diffusers' `WanPipeline`, on a CPU.

    python benchmarks/sampling.py --runs=7 --out=benchmarks/sampling.json

The network is a Wan transformer of random weights, float32, saved by diffusers and read by
vdx.interop. Both sides go from the same text features and noise to latents, in 20 steps with
guidance, by Euler's method on the same grid of times.

torch runs eagerly, in the loop of the pipeline: the scheduler, and one forward pass for each
condition. vdx is one program. The keys and values of the text are computed before its loop and,
as a way of its own, in every step. The numbers are median seconds of runs in turns. The first call
of vdx, which compiles, is a column of its own.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import diffusers
import jax
import numpy as np
import torch
from absl import app, flags
from side_by_side import Way, compare, report, torch_threads, where

from vdx.diffusion.process import RectifiedFlow
from vdx.generate.generator import Generator, Sampling
from vdx.interop.components import open_component
from vdx.models.denoiser import Denoiser
from vdx.parallel import MeshSpec
from vdx.types import Array, Batch, Params

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


class Size(NamedTuple):
    """A transformer and its clip."""

    width: int
    layers: int
    heads: int
    latents: tuple[int, int, int, int]  # [t h w c]; a token is 1 x 2 x 2 of them
    words: int  # tokens of text


# Wan reads 512 tokens of text, however short the caption is.
SIZES = {
    "small": Size(64, 2, 2, (1, 16, 16, 16), 32),
    "small_512": Size(64, 2, 2, (1, 16, 16, 16), 512),
    "medium": Size(256, 6, 4, (5, 32, 32, 16), 512),
}
STEPS = 20
GUIDANCE = 5.0
SHIFT = 3.0  # of the times; the documentation of WanPipeline has it for 480p
TEXT_WIDTH = 64
NO_CROSS_KV = mock.patch.object(Denoiser, "precompute_cross_kv", lambda *args, **more: {})


class Pair:
    """A transformer in torch, and the one of vdx with its weights."""

    def __init__(self, size: Size) -> None:
        self.torch = random_transformer(size)
        with tempfile.TemporaryDirectory() as folder:
            self.torch.save_pretrained(folder)
            component = open_component("transformer", folder, "float32")
            self.params = component.load(MeshSpec().make())

        signals = {name: dict(spec) for name, spec in component.module.signals.items()}
        signals["embeddings"]["length"] = size.words
        self.generator = Generator(
            component.module.clone(signals=signals),
            RectifiedFlow(),
            Sampling("euler", STEPS, GUIDANCE, timesteps="diffusers_euler", shift=SHIFT, batch=1),
            size.latents[1:],
        )

        rng = np.random.default_rng(0)
        self.noise = rng.standard_normal((1, *size.latents)).astype(np.float32)
        text = rng.standard_normal((2, size.words, TEXT_WIDTH)).astype(np.float32)
        self.text = text[:1]
        self.negative = text[1:]

    def torch_way(self) -> np.ndarray:
        """Run the loop of WanPipeline.__call__, without encoding and decoding."""
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        scheduler.set_timesteps(STEPS)
        x = torch.from_numpy(self.noise).movedim(-1, 1).contiguous()
        text = torch.from_numpy(self.text)
        negative = torch.from_numpy(self.negative)
        with torch.no_grad():
            for t in scheduler.timesteps:
                conditional = self._torch_velocity(x, t, text)
                unconditional = self._torch_velocity(x, t, negative)
                velocity = unconditional + GUIDANCE * (conditional - unconditional)
                x = scheduler.step(velocity, t, x, return_dict=False)[0]
        return x.movedim(1, -1).numpy()

    def _torch_velocity(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Evaluate the network once."""
        return self.torch(
            hidden_states=x, timestep=t.expand(1), return_dict=False, encoder_hidden_states=text
        )[0]

    def vdx_way(self, precompute: bool = True) -> tuple[Way, float]:
        """Compile the sampler; return it and the seconds of its first call.

        precompute: compute the keys and values of the text once, before the loop.
        """
        mask = np.ones((1, self.text.shape[1]), bool)
        text = {"text": self.text, "text_mask": mask}
        negative = {"text": self.negative, "text_mask": mask}
        generator = self.generator
        step_table = generator.step_table()

        @jax.jit
        def draw(params: Params, text: Batch, negative: Batch, noise: Array) -> Array:
            start = generator.start(noise)
            keys = jax.random.key(0)[None]
            carry, *_ = generator.run_steps(params, text, negative, start, step_table, keys)
            return carry[0]

        def run() -> np.ndarray:
            return np.asarray(draw(self.params, text, negative, self.noise))

        # Without the precomputed collection the network computes keys and values itself.
        with contextlib.nullcontext() if precompute else NO_CROSS_KV:
            start = time.perf_counter()
            run()
            return run, time.perf_counter() - start


def random_transformer(size: Size) -> torch.nn.Module:
    """Return a transformer of diffusers whose weights all matter."""
    torch.manual_seed(0)
    network = diffusers.WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=4 * size.width,
        num_layers=size.layers,
    )
    network = network.eval().requires_grad_(False)

    # Products of about the size of their input, scales of about 1.
    for parameter in network.parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim > 1:
            parameter.copy_(0.5 * noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(1 + 0.1 * noise)
    return network


def measure(size: Size, runs: int) -> list[dict[str, Any]]:
    """Return the rows of one size."""
    # torch compiles nothing, so that its first call is as any other.
    pair = Pair(size)
    once, once_first = pair.vdx_way()
    each_step, each_step_first = pair.vdx_way(precompute=False)
    ways = {"torch": pair.torch_way, "vdx": once, "vdx, keys and values each step": each_step}
    first_calls = dict(zip(ways, (0.0, once_first, each_step_first), strict=True))

    want = pair.torch_way()
    errors = {name: float(np.abs(way() - want).max()) for name, way in ways.items()}
    found = compare(ways, runs)

    # A token is 2 x 2 latents.
    t, h, w, _ = size.latents
    rows = []
    for name, measured in found.items():
        rows.append(
            {
                "width": size.width,
                "layers": size.layers,
                "tokens": t * h * w // 4,
                "words": size.words,
                "way": name,
                "seconds": measured.seconds,
                "MiB": measured.mib,
                "over torch": measured.seconds / found["torch"].seconds,
                "first call": first_calls[name],
                "error": errors[name],
            }
        )
    return rows


def main(argv: Sequence[str]) -> None:
    del argv
    torch.set_num_threads(torch_threads())
    rows = []
    for name in FLAGS.sizes:
        rows += measure(SIZES[name], FLAGS.runs)
    measured_on = where(
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        torch_threads=str(torch.get_num_threads()),
    )
    facts = {"steps": STEPS, "guidance": GUIDANCE, "runs": FLAGS.runs, "rows": rows}
    report(Path(FLAGS.out), measured_on | facts, COLUMNS)


if __name__ == "__main__":
    flags.DEFINE_string("out", "benchmarks/sampling.json", "The .json file to write.")
    flags.DEFINE_multi_enum("sizes", list(SIZES), list(SIZES), "Sizes of the transformer.")
    flags.DEFINE_integer("runs", 5, "Runs of each way.", lower_bound=1)
    app.run(main)
