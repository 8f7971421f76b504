"""The text of a plan: one plan as a table, and several as a ranking."""

import math
from typing import Any

from vdx.hardware import GIB
from vdx.planning.estimate import Slice


def gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def short(number: float) -> str:
    """1.23 T"""
    power = max(0, min(6, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g} {' KMGTPE'[power].strip()}".rstrip()


def advice(row: dict[str, Any]) -> str:
    """What to try where memory is short."""
    parts, tips = row["mesh"], []
    if row["remat"] == "none":
        tips.append("--config.model.backbone.remat=full")
    if row["what"] == "train" and row["clips"] > parts["data"] * parts["fsdp"]:
        tips.append(
            f"--config.optim.grad_accum_steps={2 if row['clips'] % 2 == 0 else row['clips']}"
        )
        tips.append(f"--config.data.loader.global_batch={row['clips'] // 2}")
    if parts["data"] > 1:
        tips.append(f"--mesh=fsdp={parts['data'] * parts['fsdp']}")
    if parts["data"] * parts["fsdp"] > 1:
        tips.append("a mesh with tensor=2 or context=2, fewer heads or tokens to a chip")
    return ", or ".join([*tips, "more chips"])


def table(row: dict[str, Any], steps: int, price: float | None) -> str:
    """A plan to read."""
    n, memory = row["devices"], row["memory"]
    mesh = ", ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1) or "one"
    t, h, w, _ = row["clip"]
    out = [
        (
            "program",
            f"{row['what']} on {row['topology']}, {n} devices, mesh {mesh}, remat "
            f"{row['remat']}" + ("" if row["compiled"] else " (estimated, not compiled)"),
        ),
        (
            "parameters",
            short(row["parameters"])
            + (f", trained {short(row['trained'])}" if row["trained"] < row["parameters"] else ""),
        ),
        (
            "one call",
            f"{row['clips']} clips of {t}x{h}x{w}, {row['tokens']:,} tokens each"
            + (f", text {row['text']}" if row["text"] else ""),
        ),
    ]
    flops = f"model {short(row['model_flops'])}, stated {short(row['stated_flops'])}"
    if row["compiled"] and row["fits"]:
        total = row["flops"] * n
        flops += f", compiled {short(total)}: {total / row['stated_flops']:.3f} of stated" + (
            f"; {row['kernels']} calls of kernels not counted" if row["kernels"] else ""
        )
    out.append(("FLOP", flops))
    if not row["fits"] and "needs" in memory:
        said = f"needs {gib(memory['needs'])} GiB of {gib(row['memory_has'])}"
    else:
        said = " + ".join(f"{k} {gib(v)}" for k, v in memory.items() if v)
        said += f" GiB of {gib(row['memory_has'])}" + ("" if row["compiled"] else ", at least")
    out.append(
        ("a device", said + (": fits" if row["fits"] else f": does not fit. Try {advice(row)}"))
    )
    for kind, places in row.get("collectives", {}).items():
        out.append(
            (
                kind,
                "; ".join(
                    f"{p['count']} {'in loops' if place == 'looped' else 'outside'}, {gib(p['bytes'])} GiB,"
                    f" the largest {p['largest'] / 2**20:.1f} MiB"
                    for place, p in places.items()
                ),
            )
        )
    if "bounds" in row:
        bound, chip = max(row["bounds"].values()), Slice(row["topology"]).chip
        mfu = row["model_flops"] / n / chip.flops / bound
        out.append(
            (
                "at least",
                ", ".join(f"{k} {v:.3g} s" for k, v in row["bounds"].items())
                + f"; MFU at most {100 * mfu:.0f} %",
            )
        )
        if row["what"] == "train":
            hours = n / chip.per_chip * steps * bound / 3600
            usual = max(hours, hours * mfu / MFU)
            out.append(
                (
                    "to train",
                    f"{steps:,} steps: {hours:,.0f} chip-hours at least, "
                    f"{usual:,.0f} at {100 * min(mfu, MFU):.0f} % MFU"
                    + (f", {usual * price:,.0f} USD" if price else ""),
                )
            )
    if row["compiled"]:
        out.append(("compiled in", f"{row['compile_seconds']:.0f} s"))
    return "\n".join(f"{name:<20}{text}" for name, text in out)


def ranking(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'s a clip':>10}  {'GiB a device':>12}  {'clips':>5}  {'remat':<14}  mesh"]
    for row in rows:
        mesh = ", ".join(f"{k}={v}" for k, v in row["mesh"].items() if v > 1)
        used = row["memory"].get("needs", sum(row["memory"].values()))
        lines.append(
            f"{_per_clip(row):>10.3g}  {gib(used):>12}  {row['clips']:>5}  "
            f"{row['remat']:<14}  {mesh}" + ("" if row["fits"] else "   does not fit")
        )
    return "\n".join(lines)


MFU = 0.4  # of the peak, what a good run reaches; for chip-hours


def _per_clip(row: dict[str, Any]) -> float:
    return max(row["bounds"].values()) / row["clips"] if "bounds" in row else math.inf
