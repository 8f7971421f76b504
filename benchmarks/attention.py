"""What attention costs by each backend that is at hand, against torch's on the same machine.

    python benchmarks/attention.py --out=benchmarks/attention.json

Self-attention of one clip, 8 heads of 64: forward, and forward with backward, in float32 and in
bfloat16. Times are medians of interleaved runs, over torch's scaled_dot_product_attention on the
same arrays; memory is the compiler's count of temporaries. Every row also says how far its answer
and gradients are from float32 attention in full. Run it on a machine that does nothing else.
"""

import functools
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from vdx.files import write_json
from vdx.models.attend import BACKENDS, Ask, attend
from vdx.parallel import platform

OUT = flags.DEFINE_string("out", None, "Where the JSON goes.")
TOKENS = flags.DEFINE_list("tokens", ["512", "2304", "4608"], "Lengths of the clip.")
RUNS = flags.DEFINE_integer("runs", 7, "Interleaved runs of each.")
HEADS, WIDTH = 8, 64


def at_hand(tokens: int, dtype: str) -> list[str]:
    """Backends for this device; splash is for tests where it is interpreted."""
    ask = Ask(tokens, tokens, WIDTH, dtype, platform=platform())
    return [name for name, backend in BACKENDS.items()
            if not backend.lacks(ask) and (name != "splash" or ask.platform == "tpu")]


def error(got, want) -> float:
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def ours(name: str, arrays: list[np.ndarray], dtype: str, want: list[np.ndarray]):
    """(forward, both), functions without arguments, and facts of the compiled programs."""
    args = [jnp.asarray(a, dtype) for a in arrays]
    f = functools.partial(attend, backend=name)
    forward = jax.jit(f).lower(*args[:3]).compile()
    both = jax.jit(lambda q, k, v, dy: jax.vjp(f, q, k, v)[1](dy)).lower(*args).compile()
    got = [forward(*args[:3]), *both(*args)]
    facts = {"error": max(map(error, got, want)),
             "forward MiB": forward.memory_analysis().temp_size_in_bytes / 2**20,
             "both MiB": both.memory_analysis().temp_size_in_bytes / 2**20}
    return [lambda: jax.block_until_ready(forward(*args[:3])),
            lambda: jax.block_until_ready(both(*args))], facts


def theirs(arrays: list[np.ndarray], dtype: str, want: list[np.ndarray]):
    """The same of torch, whose memory is not known."""
    *qkv, dy = (torch.tensor(a).to(getattr(torch, dtype)).transpose(1, 2).contiguous()
                for a in arrays)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def forward():
        with torch.no_grad():
            return sdpa(*qkv)

    def both():
        leaves = [a.detach().requires_grad_() for a in qkv]
        sdpa(*leaves).backward(dy)
        return [a.grad for a in leaves]

    got = [a.transpose(1, 2).float().numpy() for a in (forward(), *both())]
    return [forward, both], {"error": max(map(error, got, want))}


def measure(tokens: int, dtype: str) -> list[dict]:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, tokens, HEADS, WIDTH), np.float32) for _ in range(4)]
    full = functools.partial(attend, backend="xla")
    y, back = jax.vjp(full, *arrays[:3])
    want = [np.asarray(a) for a in (y, *back(jnp.asarray(arrays[3])))]
    sides = {"torch": theirs(arrays, dtype, want)}
    sides |= {name: ours(name, arrays, dtype, want) for name in at_hand(tokens, dtype)}
    times = {name: ([], []) for name in sides}
    for _ in range(RUNS.value):
        for name, (pair, _) in sides.items():
            for seen, run in zip(times[name], pair, strict=True):
                begin = time.perf_counter()
                run()
                seen.append(time.perf_counter() - begin)
    median = {name: [statistics.median(seen) for seen in pair] for name, pair in times.items()}
    return [{"tokens": tokens, "dtype": dtype, "backend": name,
             "forward": median[name][0] / median["torch"][0],
             "both": median[name][1] / median["torch"][1],
             "forward ms": median[name][0] * 1e3, "both ms": median[name][1] * 1e3, **facts}
            for name, (_, facts) in sides.items()]


def main(argv: list[str]) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = []
    print(f"{'tokens':>6} {'dtype':9} {'backend':10} {'forward':>8} {'both':>8}"
          f" {'MiB':>7} {'MiB':>7} {'error':>8}    (times over torch's)")
    for dtype in ("float32", "bfloat16"):
        for tokens in map(int, TOKENS.value):
            for row in measure(tokens, dtype):
                rows.append(row)
                print(f"{tokens:6} {dtype:9} {row['backend']:10} {row['forward']:8.2f}"
                      f" {row['both']:8.2f} {row.get('forward MiB', 0):7.1f}"
                      f" {row.get('both MiB', 0):7.1f} {row['error']:8.1e}", flush=True)
    if OUT.value:
        write_json(Path(OUT.value), {
            "heads": HEADS, "width": WIDTH, "runs": RUNS.value, "device": platform(),
            "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
            "torch": torch.__version__, "jax": jax.__version__, "rows": rows})


if __name__ == "__main__":
    app.run(main)
