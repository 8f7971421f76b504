"""What attention costs by each backend that is at hand, against torch's on the same machine.

    python benchmarks/attention.py --out=benchmarks/attention.json

Self-attention of one clip, 8 heads of 64: forward, and forward with backward ("both"), in float32
and in bfloat16. Medians of runs in turns, over torch's scaled_dot_product_attention on the same
arrays; on a CPU the memory that a call adds; how far answer and gradients are from float32
attention in full. Run it on a machine that does nothing else.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from side_by_side import compare, report, where

from vdx.models.attention.backends import BACKENDS, AttentionSpec, attend
from vdx.parallel import platform

FLAGS = flags.FLAGS
HEADS, WIDTH = 8, 64


def at_hand(tokens: int, dtype: str) -> list[str]:
    """Backends for this device; splash is for tests where it is interpreted."""
    spec = AttentionSpec(tokens, tokens, WIDTH, dtype, platform=platform())
    return [
        name
        for name, backend in BACKENDS.items()
        if not backend.unsupported(spec) and (name != "splash" or spec.platform == "tpu")
    ]


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def ours(name: str, arrays: list[np.ndarray], dtype: str) -> dict[str, Callable[[], Any]]:
    """Forward, and forward with backward."""
    args = [jnp.asarray(a, dtype) for a in arrays]
    attention = functools.partial(attend, backend=name)
    forward = jax.jit(attention)
    both = jax.jit(lambda q, k, v, dy: jax.vjp(attention, q, k, v)[1](dy))
    return {
        "forward": lambda: jax.block_until_ready(forward(*args[:3])),
        "both": lambda: jax.block_until_ready(both(*args)),
    }


def theirs(arrays: list[np.ndarray], dtype: str) -> dict[str, Callable[[], Any]]:
    """The same of torch; answers and gradients [b n s d]."""
    *qkv, dy = (
        torch.tensor(a).to(getattr(torch, dtype)).transpose(1, 2).contiguous() for a in arrays
    )
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def forward():
        with torch.no_grad():
            return sdpa(*qkv)

    def both():
        leaves = [a.detach().requires_grad_() for a in qkv]
        sdpa(*leaves).backward(dy)
        return [a.grad for a in leaves]

    return {"forward": forward, "both": both}


def seen(way: Mapping[str, Callable[[], Any]]) -> list[np.ndarray]:
    """Answer and gradients [b s n d], float32."""
    return [
        a.transpose(1, 2).float().numpy()
        if isinstance(a, torch.Tensor)
        else np.asarray(a, np.float32)
        for a in (way["forward"](), *way["both"]())
    ]


def measure(tokens: int, dtype: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, tokens, HEADS, WIDTH), np.float32) for _ in range(4)]
    want = seen(ours("xla", arrays, "float32"))
    ways = {"torch": theirs(arrays, dtype)}
    ways |= {name: ours(name, arrays, dtype) for name in at_hand(tokens, dtype)}
    rows = {
        name: {
            "tokens": tokens,
            "dtype": dtype,
            "backend": name,
            "error": max(map(error, seen(way), want)),
        }
        for name, way in ways.items()
    }
    for what in ("forward", "both"):
        found = compare({name: way[what] for name, way in ways.items()}, FLAGS.runs)
        for name, one in found.items():
            rows[name] |= {
                f"{what}, s": one["seconds"],
                f"{what}, MiB": one["mib"],
                f"{what} over torch": one["seconds"] / found["torch"]["seconds"],
            }
    return list(rows.values())


def main(argv: list[str]) -> None:
    del argv
    rows = [
        row
        for dtype in ("float32", "bfloat16")
        for tokens in map(int, FLAGS.tokens)
        for row in measure(tokens, dtype)
    ]
    columns = {"tokens": ",", "dtype": "", "backend": ""}
    for what in ("forward", "both"):
        columns |= {f"{what}, s": ".3f", f"{what} over torch": ".2f", f"{what}, MiB": ",.0f"}
    report(
        Path(FLAGS.out),
        where(torch=torch.__version__)
        | {"heads": HEADS, "width": WIDTH, "runs": FLAGS.runs, "rows": rows},
        columns | {"error": ".0e"},
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The .json file to write.", required=True)
    flags.DEFINE_list("tokens", ["512", "2304", "4608"], "Lengths of the clip.")
    flags.DEFINE_integer("runs", 7, "Of each way.", lower_bound=1)
    app.run(main)
