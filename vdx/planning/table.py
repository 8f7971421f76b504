"""The text of plans: one plan as a table, several as a ranking."""

import math

from vdx.hardware import GIB
from vdx.planning.job import Slice
from vdx.planning.planner import Plan

MFU = 0.4  # the share of the peak that a good run reaches, for chip-hours
MIB = 2.0**20
LABEL_WIDTH = 20


def table(plan: Plan, steps: int, price: float | None) -> str:
    """Return a plan as lines of label and text.

    steps: of the whole training. price: US dollars of a chip-hour.
    """
    rows = [
        ("program", program_text(plan)),
        ("parameters", parameters_text(plan)),
        ("one call", call_text(plan)),
        ("FLOP", flops_text(plan)),
        ("a device", memory_text(plan)),
        *collective_rows(plan),
    ]
    if plan.bounds is not None:
        rows.append(("at least", bounds_text(plan.bounds, mfu_bound(plan))))
        if plan.what == "train":
            rows.append(("to train", training_text(plan, steps, price)))
    if plan.compile_seconds is not None:
        rows.append(("compiled in", f"{plan.compile_seconds:.0f} s"))
    return "\n".join(f"{label:<{LABEL_WIDTH}}{text}" for label, text in rows)


def ranking(plans: list[Plan]) -> str:
    """Return several plans as a table, one a line, in the order given."""
    lines = [f"{'s a clip':>10}  {'GiB a device':>12}  {'clips':>5}  {'remat':<14}  mesh"]
    for plan in plans:
        line = (
            f"{plan.seconds_per_clip:>10.3g}  {gib(plan.memory_needs):>12}  {plan.clips:>5}  "
            f"{plan.remat:<14}  {mesh_text(plan)}"
        )
        if not plan.fits:
            line += "   does not fit"
        lines.append(line)
    return "\n".join(lines)


def program_text(plan: Plan) -> str:
    """Return the program, the chips and the mesh."""
    text = (
        f"{plan.what} on {plan.topology}, {plan.devices} devices, mesh {mesh_text(plan) or 'one'}, "
        f"remat {plan.remat}"
    )
    if not plan.compiled:
        text += " (estimated, not compiled)"
    return text


def mesh_text(plan: Plan) -> str:
    """Return the axes that split something, such as "fsdp=8, context=2"."""
    return ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)


def parameters_text(plan: Plan) -> str:
    """Return the number of parameters, and of the trained ones if they are fewer."""
    text = short(plan.parameters)
    if plan.trained < plan.parameters:
        text += f", trained {short(plan.trained)}"
    return text


def call_text(plan: Plan) -> str:
    """Return the clips of one call and their size."""
    t, h, w, _ = plan.clip
    text = f"{plan.clips} clips of {t}x{h}x{w}, {plan.tokens:,} tokens each"
    if plan.text:
        text += f", text {plan.text}"
    return text


def flops_text(plan: Plan) -> str:
    """Return the operations of one call: the model's, the stated, the compiled ones."""
    text = f"model {short(plan.model_flops)}, stated {short(plan.stated_flops)}"
    if plan.compiled and plan.fits and plan.counts is not None:
        compiled = plan.counts.flops * plan.devices
        share = compiled / plan.stated_flops
        text += f", compiled {short(compiled)}: {share:.3f} of stated"
        if plan.counts.kernels:
            text += f"; {plan.counts.kernels} calls of kernels not counted"
    return text


def memory_text(plan: Plan) -> str:
    """Return the memory of a device, by purpose, and advice where it is too small."""
    capacity = gib(plan.memory_has)
    if "needs" in plan.memory:
        text = f"needs {gib(plan.memory['needs'])} GiB of {capacity}"
    else:
        purposes = [f"{purpose} {gib(size)}" for purpose, size in plan.memory.items() if size]
        text = f"{' + '.join(purposes)} GiB of {capacity}"
        if not plan.compiled:
            text += ", at least"
    if plan.fits:
        return f"{text}: fits"
    return f"{text}: does not fit. Try {advice(plan)}"


def advice(plan: Plan) -> str:
    """Return what to try where memory is too small, the simplest first."""
    mesh = plan.mesh
    shares = mesh["data"] * mesh["fsdp"]
    tips = []
    if plan.remat == "none":
        tips.append("--config.model.backbone.remat=full")
    if plan.what == "train" and plan.clips > shares:
        microbatches = 2 if plan.clips % 2 == 0 else plan.clips
        tips.append(f"--config.optim.grad_accum_steps={microbatches}")
        tips.append(f"--config.data.loader.global_batch={plan.clips // 2}")
    if mesh["data"] > 1:
        tips.append(f"--mesh=fsdp={shares}")
    if shares > 1:
        tips.append("a mesh with tensor=2 or context=2, fewer heads or tokens to a chip")
    tips.append("more chips")
    return ", or ".join(tips)


def collective_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return (kind, text) of every kind of collective."""
    if plan.counts is None:
        return []
    rows = []
    for kind, places in plan.counts.collectives.items():
        texts = []
        for place, totals in places.items():
            where = "in loops" if place == "looped" else "outside"
            texts.append(
                f"{totals['count']} {where}, {gib(totals['bytes'])} GiB, "
                f"the largest {totals['largest'] / MIB:.1f} MiB"
            )
        rows.append((kind, "; ".join(texts)))
    return rows


def mfu_bound(plan: Plan) -> float:
    """Return the MFU at the least time: the model's share of the peak."""
    peak = Slice(plan.topology).chip.flops
    return plan.model_flops / plan.devices / peak / plan.seconds


def bounds_text(bounds: dict[str, float], mfu: float) -> str:
    """Return the least times of a call."""
    times = ", ".join(f"{limit} {seconds:.3g} s" for limit, seconds in bounds.items())
    return f"{times}; MFU at most {100 * mfu:.0f} %"


def training_text(plan: Plan, steps: int, price: float | None) -> str:
    """Return the chip-hours of a training, at least and at the MFU of a good run."""
    chips = plan.devices / Slice(plan.topology).chip.per_chip
    mfu = mfu_bound(plan)
    least_hours = chips * steps * plan.seconds / 3600
    usual_hours = max(least_hours, least_hours * mfu / MFU)
    text = (
        f"{steps:,} steps: {least_hours:,.0f} chip-hours at least, "
        f"{usual_hours:,.0f} at {100 * min(mfu, MFU):.0f} % MFU"
    )
    if price:
        text += f", {usual_hours * price:,.0f} USD"
    return text


def gib(size: float) -> str:
    """Return bytes as a number of GiB."""
    if size < 100 * GIB:
        return f"{size / GIB:.2f}"
    return f"{size / GIB:.0f}"


def short(number: float) -> str:
    """Return a number with a prefix, such as "1.23 T"."""
    power = int(math.log10(max(number, 1)) // 3)
    power = max(0, min(6, power))
    prefix = " KMGTPE"[power]
    return f"{number / 1000**power:.3g} {prefix.strip()}".rstrip()
