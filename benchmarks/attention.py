"""Compare the attention backends of this device with torch's attention.

    python benchmarks/attention.py --out=benchmarks/attention.json

The work is self-attention of one clip, 8 heads of 64: forward, and forward with backward ("both"),
in float32 and in bfloat16. The numbers are medians of runs in turns, over those of torch's
scaled_dot_product_attention on the same arrays; on a CPU also the memory that a call adds. The
error is the distance of outputs and gradients from float32 attention that computes all scores at
once. Run it on an idle machine; torch runs on the same one.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from side_by_side import Way, compare, report, where

from vdx.models.attention.backends import BACKENDS, AttentionSpec, attend
from vdx.parallel import platform

FLAGS = flags.FLAGS
HEADS = 8
WIDTH = 64  # features of a head

COLUMNS = {
    "tokens": ",",
    "dtype": "",
    "backend": "",
    "forward, s": ".3f",
    "forward over torch": ".2f",
    "forward, MiB": ",.0f",
    "both, s": ".3f",
    "both over torch": ".2f",
    "both, MiB": ",.0f",
    "error": ".0e",
}


def available_backends(tokens: int, dtype: str) -> list[str]:
    """Return the backends for this device.

    Splash also runs elsewhere, interpreted, which is for tests and is left out.
    """
    spec = AttentionSpec(tokens, tokens, WIDTH, dtype, platform=platform())
    return [
        name
        for name, backend in BACKENDS.items()
        if not backend.unsupported(spec) and (name != "splash" or spec.platform == "tpu")
    ]


def vdx_ways(name: str, arrays: list[np.ndarray], dtype: str) -> dict[str, Way]:
    """Return forward, and forward with backward, of a backend of vdx."""
    args = [jnp.asarray(array, dtype) for array in arrays]
    attention = functools.partial(attend, backend=name)
    forward = jax.jit(attention)
    both = jax.jit(lambda q, k, v, dy: jax.vjp(attention, q, k, v)[1](dy))
    return {
        "forward": lambda: jax.block_until_ready(forward(*args[:3])),
        "both": lambda: jax.block_until_ready(both(*args)),
    }


def torch_ways(arrays: list[np.ndarray], dtype: str) -> dict[str, Way]:
    """Return forward, and forward with backward, of torch; its arrays are [b n s d]."""
    tensors = [torch.tensor(array).to(getattr(torch, dtype)) for array in arrays]
    *qkv, dy = [tensor.transpose(1, 2).contiguous() for tensor in tensors]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return sdpa(*qkv)

    def both() -> list[torch.Tensor]:
        leaves = [a.detach().requires_grad_() for a in qkv]
        sdpa(*leaves).backward(dy)
        return [a.grad for a in leaves]

    return {"forward": forward, "both": both}


def results_of(ways: Mapping[str, Way]) -> list[np.ndarray]:
    """Return output and gradients, float32 [b s n d]."""
    results = []
    for array in (ways["forward"](), *ways["both"]()):
        if isinstance(array, torch.Tensor):
            array = array.transpose(1, 2).float().numpy()
        results.append(np.asarray(array, np.float32))
    return results


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the distance of two arrays over the norm of the second."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(tokens: int, dtype: str) -> list[dict[str, Any]]:
    """Return the rows of all backends at one length and type."""
    rng = np.random.default_rng(0)
    shape = (1, tokens, HEADS, WIDTH)
    arrays = [rng.standard_normal(shape, np.float32) for _ in range(4)]  # q, k, v, dy
    backends = {"torch": torch_ways(arrays, dtype)}
    for name in available_backends(tokens, dtype):
        backends[name] = vdx_ways(name, arrays, dtype)

    # Errors.
    want = results_of(vdx_ways("xla", arrays, "float32"))
    rows = {}
    for name, ways in backends.items():
        error = max(map(relative_error, results_of(ways), want))
        rows[name] = {"tokens": tokens, "dtype": dtype, "backend": name, "error": error}

    # Times and memory.
    for work in ("forward", "both"):
        found = compare({name: ways[work] for name, ways in backends.items()}, FLAGS.runs)
        for name, measured in found.items():
            rows[name] |= {
                f"{work}, s": measured.seconds,
                f"{work}, MiB": measured.mib,
                f"{work} over torch": measured.seconds / found["torch"].seconds,
            }
    return list(rows.values())


def main(argv: Sequence[str]) -> None:
    del argv
    rows = []
    for dtype in ("float32", "bfloat16"):
        for tokens in FLAGS.tokens:
            rows += measure(int(tokens), dtype)
    facts = {"heads": HEADS, "width": WIDTH, "runs": FLAGS.runs, "rows": rows}
    report(Path(FLAGS.out), where(torch=torch.__version__) | facts, COLUMNS)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The .json file to write.", required=True)
    flags.DEFINE_list("tokens", ["512", "2304", "4608"], "Lengths of the clip.")
    flags.DEFINE_integer("runs", 7, "Runs of each backend.", lower_bound=1)
    app.run(main)
