"""A Wan-shaped transformer beside that of diffusers on torch, with the same weights.

    python benchmarks/transformer.py --out=benchmarks/transformer.json                 # 2 CPU cores
    python benchmarks/transformer.py --size=1p3b --dtype=bfloat16 --out=h100.json      # one GPU

Forward pass, and training step (mean squared error, backward pass, AdamW) without and with
checkpoints of the layers, batch 1, in turns, medians over those of eager torch without checkpoints,
and on a CPU the memory that a call adds.
Both get the same noisy latents, times and text; the predictions are compared before anything is
timed. bfloat16: the products of both; parameters of the training step stay float32. MFU: the
multiply-adds of the model, times three for a training step, over those that the chip could do.
"""

import contextlib
import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from absl import app, flags
from side_by_side import compare, report, where

from vdx.hardware import chip_of
from vdx.interop.wan import load_wan, open_wan
from vdx.models.denoiser import Denoiser
from vdx.parallel import MeshSpec

FLAGS = flags.FLAGS
# Of diffusers; latents [t h w] of the forward pass and of the training step.
SIZES: dict[str, dict[str, Any]] = {
    "toy": dict(
        config=dict(
            num_attention_heads=2, attention_head_dim=32, num_layers=2, ffn_dim=128, text_dim=32
        ),
        forward=[(3, 16, 16)],
        train=(3, 16, 16),
    ),
    "40m": dict(
        config=dict(
            num_attention_heads=8, attention_head_dim=64, num_layers=8, ffn_dim=2048, text_dim=512
        ),
        forward=[(9, 32, 32), (9, 64, 64)],
        train=(9, 32, 32),
    ),
    "1p3b": dict(
        config=dict(
            num_attention_heads=12,
            attention_head_dim=128,
            num_layers=30,
            ffn_dim=8960,
            text_dim=4096,
        ),
        forward=[(21, 60, 104)],
        train=(5, 60, 104),
    ),
}
REMATS = ("none", "save_attention", "full")
WORDS, RATE = 512, 1e-4


class Pair:
    """The reference on torch with random weights, and ours read from its files."""

    def __init__(self, size: str, dtype: str):
        self.dtype, self.text_dim = dtype, SIZES[size]["config"]["text_dim"]
        config = dict(
            in_channels=16,
            out_channels=16,
            freq_dim=256,
            cross_attn_norm=True,
            rope_max_seq_len=1024,
            patch_size=(1, 2, 2),
            **SIZES[size]["config"],
        )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        with torch.device(self.device):
            self.theirs = diffusers.WanTransformer3DModel(**config)
        with tempfile.TemporaryDirectory() as folder:
            self.theirs.save_pretrained(folder)
            self.wan = open_wan(folder)
            self.params = load_wan(folder, self.ours("none"), MeshSpec().make(jax.devices()[:1]))

    def ours(self, remat: str) -> Denoiser:
        return Denoiser(
            {**self.wan.backbone, "dtype": self.dtype, "remat": remat}, self.wan.signals
        )

    def inputs(self, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
        return {
            "x": draw(1, *grid, 16),
            "target": draw(1, *grid, 16),
            "text": draw(1, WORDS, self.text_dim),
            "time": np.array([500.0], np.float32),
        }

    # Ours

    def predict(self, params, x, time, text, remat="none"):
        batch, ours = {"text": text, "text_mask": jnp.ones(text.shape[:2], bool)}, self.ours(remat)
        return ours.run(params, x, time, batch, ours.drop_masks(1, False), method="train_view")

    def forward(self, given: dict):
        params = self.params
        if self.dtype != "float32":
            params = jax.tree.map(
                lambda x: x.astype(self.dtype) if x.ndim > 1 and x.size > 1e5 else x, params
            )
        run = jax.jit(self.predict)
        args = [jax.device_put(given[name]) for name in ("x", "time", "text")]
        return lambda: jax.block_until_ready(run(params, *args))

    def step(self, given: dict, remat: str):
        tx = optax.adamw(RATE)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(params, state, x, time, text, target):
            loss = lambda params: jnp.square(
                self.predict(params, x, time, text, remat) - target
            ).mean()
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        held = [jax.tree.map(jnp.copy, self.params), jax.jit(tx.init)(self.params)]
        args = [jax.device_put(given[name]) for name in ("x", "time", "text", "target")]

        def run():
            held[0], held[1], value = update(*held, *args)
            return jax.block_until_ready(value)

        return run

    # Theirs

    def torch_inputs(self, given: dict):
        laid = {
            name: torch.from_numpy(
                np.ascontiguousarray(np.moveaxis(a, -1, 1)) if a.ndim == 5 else a
            ).to(self.device)
            for name, a in given.items()
        }
        return laid["x"], laid["time"], laid["text"], laid["target"]

    def autocast(self):
        return (
            torch.autocast(self.device, torch.bfloat16)
            if self.dtype == "bfloat16"
            else contextlib.nullcontext()
        )

    def torch_forward(self, given: dict, compiled: bool):
        x, time, text, _ = self.torch_inputs(given)
        net = self.theirs.eval()
        net = torch.compile(net, mode="max-autotune-no-cudagraphs") if compiled else net

        def run():
            with torch.no_grad(), self.autocast():
                out = net(x, time, text, return_dict=False)[0]
            self.wait()
            return out

        return run

    def torch_step(self, given: dict, checkpoints: bool, compiled: bool):
        x, time, text, target = self.torch_inputs(given)
        net = copy.deepcopy(self.theirs).train()
        if checkpoints:
            net.enable_gradient_checkpointing()
        tx = torch.optim.AdamW(net.parameters(), RATE, fused=True)
        call = torch.compile(net) if compiled else net

        def run():
            with self.autocast():
                out = call(x, time, text, return_dict=False)[0]
            loss = (out.float() - target).square().mean()
            loss.backward()
            tx.step()
            tx.zero_grad()
            self.wait()

        return run

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def forward(pair: Pair, grid: tuple[int, int, int]) -> list[dict[str, Any]]:
    given = pair.inputs(grid)
    cases = {"torch": pair.torch_forward(given, False), "vdx": pair.forward(given)}
    want = np.moveaxis(cases["torch"]().float().cpu().numpy(), 1, -1)
    apart = float(np.abs(np.asarray(cases["vdx"](), np.float32) - want).max())
    if FLAGS.compile:
        cases["torch, compiled"] = pair.torch_forward(given, True)
    return measured(pair, "forward", grid, cases, 1, apart=apart)


def step(pair: Pair, grid: tuple[int, int, int]) -> list[dict[str, Any]]:
    given = pair.inputs(grid)
    cases = {
        "torch" + ", compiled" * compiled + ", checkpoints" * checkpoints: pair.torch_step(
            given, checkpoints, compiled
        )
        for compiled in (False, True)[: 1 + FLAGS.compile]
        for checkpoints in (False, True)
    }
    cases |= {f"vdx, remat {remat}": pair.step(given, remat) for remat in REMATS}
    return measured(pair, "training step", grid, cases, 3)


def measured(
    pair: Pair, what: str, grid: tuple[int, int, int], cases: dict, passes: int, **more
) -> list[dict[str, Any]]:
    ours, chip = pair.ours("none"), chip_of(jax.devices()[0].device_kind)
    flops, found = passes * ours.flops((*grid, 16), WORDS), compare(cases, FLAGS.runs)
    return [
        {
            "what": what,
            "tokens": ours.num_tokens((1, *grid, 16)),
            "by": name,
            "seconds": one["seconds"],
            "over torch": one["seconds"] / found["torch"]["seconds"],
            "MiB": one["mib"],
            "GFLOP/s": flops / one["seconds"] / 1e9,
            "MFU": flops / one["seconds"] / chip.flops if chip else "",
            **more,
        }
        for name, one in found.items()
    ]


def main(argv):
    del argv
    size, pair, rows = SIZES[FLAGS.size], Pair(FLAGS.size, FLAGS.dtype), []
    for grid in size["forward"]:
        rows += forward(pair, grid)
    rows += step(pair, size["train"])
    report(
        Path(FLAGS.out),
        where(torch=torch.__version__, size=FLAGS.size, dtype=FLAGS.dtype) | {"rows": rows},
        {
            "what": "",
            "tokens": ",",
            "by": "",
            "seconds": ".3f",
            "over torch": ".2f",
            "MiB": ",.0f",
            "GFLOP/s": ".0f",
            "MFU": ".2f" if chip_of(jax.devices()[0].device_kind) else "",
        },
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The .json file to write.", required=True)
    flags.DEFINE_enum("size", "40m", list(SIZES), "Of the network and the clip.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the products.")
    flags.DEFINE_integer("runs", 7, "Timed runs of each.", lower_bound=1)
    flags.DEFINE_bool("compile", True, "Also torch.compile.")
    app.run(main)
