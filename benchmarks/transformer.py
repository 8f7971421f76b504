"""Compare a Wan-shaped transformer with that of diffusers, with the same weights.

    python benchmarks/transformer.py --out=benchmarks/transformer.json                 # 2 CPU cores
    python benchmarks/transformer.py --size=1p3b --dtype=bfloat16 --out=h100.json      # one GPU

The work is a forward pass, and a training step (mean squared error, backward pass, AdamW) without
and with checkpoints of the layers, batch 1. The numbers are medians of runs in turns, over those of
eager torch without checkpoints; on a CPU also the memory that a call adds.

Both get the same noisy latents, times and text, and the predictions are compared before anything
is timed. bfloat16 is the type of the products of both; parameters of the training step stay
float32. MFU is the operations of the model, times three for a training step, over those that the
chip could do in that time.
"""

import contextlib
import copy
import functools
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from absl import app, flags
from side_by_side import Way, compare, report, where

from vdx.hardware import Chip, chip_of
from vdx.interop.wan import load_wan, open_wan
from vdx.models.denoiser import Denoiser
from vdx.parallel import MeshSpec
from vdx.types import Array, Params

FLAGS = flags.FLAGS
Grid = tuple[int, int, int]
Inputs = dict[str, np.ndarray]


class Size(NamedTuple):
    """A transformer of diffusers and its clips."""

    config: dict[str, int]
    forward: list[Grid]  # latents [t h w] of the forward passes
    train: Grid  # latents [t h w] of the training step


SIZES = {
    "toy": Size(
        config=dict(
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=2,
            ffn_dim=128,
            text_dim=32,
        ),
        forward=[(3, 16, 16)],
        train=(3, 16, 16),
    ),
    "40m": Size(
        config=dict(
            num_attention_heads=8,
            attention_head_dim=64,
            num_layers=8,
            ffn_dim=2048,
            text_dim=512,
        ),
        forward=[(9, 32, 32), (9, 64, 64)],
        train=(9, 32, 32),
    ),
    "1p3b": Size(
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
CHANNELS = 16
REMATS = ("none", "save_attention", "full")
WORDS = 512  # tokens of text, the length that Wan pads to
LEARNING_RATE = 1e-4
LARGE = 1e5  # entries of a parameter that a forward pass keeps in the type of the products


class Pair:
    """The reference on torch with random weights, and that of vdx with the same."""

    def __init__(self, size: Size, dtype: str) -> None:
        self.dtype = dtype
        self.text_dim = size.config["text_dim"]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        with torch.device(self.device):
            self.torch = diffusers.WanTransformer3DModel(
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                freq_dim=256,
                cross_attn_norm=True,
                rope_max_seq_len=1024,
                patch_size=(1, 2, 2),
                **size.config,
            )
        with tempfile.TemporaryDirectory() as folder:
            self.torch.save_pretrained(folder)
            self.wan = open_wan(folder)
            mesh = MeshSpec().make(jax.devices()[:1])
            self.params = load_wan(folder, self.denoiser("none"), mesh)

    def denoiser(self, remat: str) -> Denoiser:
        """Return the network of vdx."""
        backbone = {**self.wan.backbone, "dtype": self.dtype, "remat": remat}
        return Denoiser(backbone, self.wan.signals)

    def inputs(self, grid: Grid) -> Inputs:
        """Return a noisy clip, its target, its text and its time."""
        rng = np.random.default_rng(0)
        clip = (1, *grid, CHANNELS)
        return {
            "x": rng.normal(size=clip).astype(np.float32),
            "target": rng.normal(size=clip).astype(np.float32),
            "text": rng.normal(size=(1, WORDS, self.text_dim)).astype(np.float32),
            "time": np.array([500.0], np.float32),
        }

    def predict(
        self, params: Params, x: Array, time: Array, text: Array, remat: str = "none"
    ) -> Array:
        """Evaluate the network of vdx."""
        denoiser = self.denoiser(remat)
        batch = {"text": text, "text_mask": jnp.ones(text.shape[:2], bool)}
        drop = denoiser.drop_masks(1, False)
        return denoiser.run(params, x, time, batch, drop, method="train_view")

    def vdx_forward(self, inputs: Inputs) -> Way:
        """Return a forward pass of vdx."""

        def cast(leaf: jax.Array) -> jax.Array:
            is_kernel = leaf.ndim > 1 and leaf.size > LARGE
            return leaf.astype(self.dtype) if is_kernel else leaf

        params = self.params
        if self.dtype != "float32":
            params = jax.tree.map(cast, params)
        run = jax.jit(self.predict)
        args = [jax.device_put(inputs[name]) for name in ("x", "time", "text")]
        return lambda: jax.block_until_ready(run(params, *args))

    def vdx_step(self, inputs: Inputs, remat: str) -> Way:
        """Return a training step of vdx, which continues from the step before it."""
        tx = optax.adamw(LEARNING_RATE)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(
            params: Params,
            opt_state: optax.OptState,
            x: Array,
            time: Array,
            text: Array,
            target: Array,
        ) -> tuple[Params, optax.OptState, Array]:
            def loss(params: Params) -> Array:
                return jnp.square(self.predict(params, x, time, text, remat) - target).mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        # A copy, because the step takes over the memory of what it is given.
        params = jax.tree.map(jnp.copy, self.params)
        opt_state = jax.jit(tx.init)(self.params)
        args = [jax.device_put(inputs[name]) for name in ("x", "time", "text", "target")]

        def run() -> Array:
            nonlocal params, opt_state
            params, opt_state, value = update(params, opt_state, *args)
            return jax.block_until_ready(value)

        return run

    def torch_inputs(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Return the inputs for torch, clips as [b c t h w]."""
        tensors = {}
        for name, array in inputs.items():
            if array.ndim == 5:
                array = np.ascontiguousarray(np.moveaxis(array, -1, 1))
            tensors[name] = torch.from_numpy(array).to(self.device)
        return tensors

    def torch_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which torch computes products in the chosen type."""
        if self.dtype == "bfloat16":
            return torch.autocast(self.device, torch.bfloat16)
        return contextlib.nullcontext()

    def torch_wait(self) -> None:
        """Wait until the device has computed everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def torch_forward(self, inputs: Inputs, compiled: bool) -> Way:
        """Return a forward pass of torch."""
        tensors = self.torch_inputs(inputs)
        network = self.torch.eval()
        if compiled:
            network = torch.compile(network, mode="max-autotune-no-cudagraphs")

        def run() -> torch.Tensor:
            with torch.no_grad(), self.torch_autocast():
                out = network(tensors["x"], tensors["time"], tensors["text"], return_dict=False)[0]
            self.torch_wait()
            return out

        return run

    def torch_step(self, inputs: Inputs, checkpoints: bool, compiled: bool) -> Way:
        """Return a training step of torch, on a copy of the network."""
        tensors = self.torch_inputs(inputs)
        network = copy.deepcopy(self.torch).train()
        if checkpoints:
            network.enable_gradient_checkpointing()
        tx = torch.optim.AdamW(network.parameters(), LEARNING_RATE, fused=True)
        call = torch.compile(network) if compiled else network

        def run() -> None:
            with self.torch_autocast():
                out = call(tensors["x"], tensors["time"], tensors["text"], return_dict=False)[0]
            loss = (out.float() - tensors["target"]).square().mean()
            loss.backward()
            tx.step()
            tx.zero_grad()
            self.torch_wait()

        return run


def forward_rows(pair: Pair, grid: Grid) -> list[dict[str, Any]]:
    """Return the rows of a forward pass; `apart`: how far the predictions differ."""
    inputs = pair.inputs(grid)
    ways = {"torch": pair.torch_forward(inputs, False), "vdx": pair.vdx_forward(inputs)}

    want = np.moveaxis(ways["torch"]().float().cpu().numpy(), 1, -1)
    got = np.asarray(ways["vdx"](), np.float32)
    apart = float(np.abs(got - want).max())

    if FLAGS.compile:
        ways["torch, compiled"] = pair.torch_forward(inputs, True)
    rows = measure(pair, "forward", grid, ways, passes=1)
    return [row | {"apart": apart} for row in rows]


def step_rows(pair: Pair, grid: Grid) -> list[dict[str, Any]]:
    """Return the rows of a training step."""
    inputs = pair.inputs(grid)
    ways = {}
    compiled_or_not = (False, True) if FLAGS.compile else (False,)
    for compiled, checkpoints in itertools.product(compiled_or_not, (False, True)):
        name = "torch"
        if compiled:
            name += ", compiled"
        if checkpoints:
            name += ", checkpoints"
        ways[name] = pair.torch_step(inputs, checkpoints, compiled)
    for remat in REMATS:
        ways[f"vdx, remat {remat}"] = pair.vdx_step(inputs, remat)
    return measure(pair, "training step", grid, ways, passes=3)


def measure(
    pair: Pair, what: str, grid: Grid, ways: dict[str, Way], passes: int
) -> list[dict[str, Any]]:
    """Return the rows of several ways; the work is `passes` forward passes."""
    denoiser = pair.denoiser("none")
    flops = passes * denoiser.flops((*grid, CHANNELS), WORDS)
    chip = this_chip()
    found = compare(ways, FLAGS.runs)

    # The same work for every way, whatever remat or checkpoints recompute.
    rows = []
    for name, measured in found.items():
        rate = flops / measured.seconds
        rows.append(
            {
                "what": what,
                "tokens": denoiser.num_tokens((1, *grid, CHANNELS)),
                "by": name,
                "seconds": measured.seconds,
                "over torch": measured.seconds / found["torch"].seconds,
                "MiB": measured.mib,
                "GFLOP/s": rate / 1e9,
                "MFU": rate / chip.flops if chip else "",
            }
        )
    return rows


def this_chip() -> Chip | None:
    """Return the row of this device; None for a CPU, which has no MFU."""
    return chip_of(jax.devices()[0].device_kind)


def main(argv: Sequence[str]) -> None:
    del argv
    size = SIZES[FLAGS.size]
    pair = Pair(size, FLAGS.dtype)
    rows = []
    for grid in size.forward:
        rows += forward_rows(pair, grid)
    rows += step_rows(pair, size.train)

    measured_on = where(torch=torch.__version__, size=FLAGS.size, dtype=FLAGS.dtype)
    columns = {
        "what": "",
        "tokens": ",",
        "by": "",
        "seconds": ".3f",
        "over torch": ".2f",
        "MiB": ",.0f",
        "GFLOP/s": ".0f",
        "MFU": ".2f" if this_chip() else "",
    }
    report(Path(FLAGS.out), measured_on | {"rows": rows}, columns)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The .json file to write.", required=True)
    flags.DEFINE_enum("size", "40m", list(SIZES), "Size of the network and the clip.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the products.")
    flags.DEFINE_integer("runs", 7, "Timed runs of each way.", lower_bound=1)
    flags.DEFINE_bool("compile", True, "Also measure torch.compile.")
    app.run(main)
