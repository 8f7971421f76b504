"""Plan: python -m vdx.plan --config=configs/t2v_base.py --topology=v5e:4x4 --clip=16,32,32 \\
    --text=256

Compiles the very step that vdx.main would run, for chips that are not here, and says what it needs:
operations, memory, collectives, time at best, chip-hours. --what=sample plans the sampler,
--what=decode the decoder; --search tries meshes, remat policies and batches. See docs/planning.md.
"""

# ruff: noqa: E402
import os


def compile_only() -> None:
    """What libtpu reads as it starts: that there is no TPU, and that others may use it too."""
    os.environ.update(
        {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    )
    for name, level in (
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, level)


if __name__ == "__main__":
    compile_only()  # before jax is imported

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from tqdm import tqdm

from vdx.config.build import ConfigError, lookup
from vdx.config.loader import is_override, resolve
from vdx.experiment import Experiment
from vdx.files import write_json
from vdx.hardware import GIB
from vdx.main import exit_on_user_error
from vdx.models.remat import REMAT
from vdx.models.transformer import Transformer
from vdx.parallel import AXES, MeshSpec
from vdx.planning.estimate import PROGRAMS, Job, Slice, abstract_mesh, least_memory, plan, sent
from vdx.sample import mesh_spec

FLAGS = flags.FLAGS
MFU = 0.4  # of the peak, what a good run reaches; for chip-hours


def sizes(text: str | None) -> tuple[int, ...] | None:
    try:
        return tuple(int(n) for n in text.split(",")) if text else None
    except ValueError as error:
        raise app.UsageError(f"--clip={text} is not like 16,32,32.") from error


def shapes(
    experiment: Experiment, clip: tuple[int, ...] | None, text: int | None
) -> tuple[tuple[int, ...], int | None]:
    """([t h w c] of a clip of the model, tokens of cached text): as given, or as the data has it.
    Raises ConfigError if nobody says it."""
    channels = experiment.model.channels
    if clip is not None and len(clip) != 3:
        raise ConfigError(f"--clip={','.join(map(str, clip))} is not frames, height and width.")
    if experiment.clip is not None:
        own = experiment.clip.lengths[0], experiment.data.height, experiment.data.width
        return (*(clip or own), channels), text
    if clip is None or (text is None and "embeddings" in experiment.model.signals):
        try:
            known = getattr(experiment.source(), "metadata", {})
        except (ConfigError, OSError, ValueError):
            known = {}
        cached = tuple(known.get("latents") or (None,))
        clip = clip or (None if None in cached else cached[:3])
        text = text or (known.get("text") or (None,))[0]
        if clip is None or text is None:
            raise ConfigError(
                "The metadata of config.data.path does not say what its clips are like, or no data "
                "is there. Say the frames, height and width of the latents, and how many tokens a "
                "caption has: --clip=16,32,32 --text=256"
            )
    return (*clip, channels), text


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


def meshes(count: int) -> Iterator[dict[str, int]]:
    """Every way to lay `count` devices out."""
    parts = [n for n in range(1, count + 1) if count % n == 0]
    for some in itertools.product(parts, repeat=len(AXES)):
        if math.prod(some) == count:
            yield dict(zip(AXES, some, strict=True))


def variants(job: Job, slice_: Slice) -> Iterator[dict[str, Any]]:
    """Rows for --search of what can be laid out, before anything is compiled: sections of the
    config, `memory` that is needed at least, `seconds` a clip, roughly."""
    e, chip, data = job.experiment, slice_.chip, job.experiment.config["data"]
    forward = e.model.flops(job.clip, job.text) / slice_.devices / chip.flops
    for mesh in tqdm(list(meshes(slice_.devices)), desc="meshes", unit="mesh"):
        shares = mesh["data"] * mesh["fsdp"]
        loader = lambda clips: {
            "data": {**data, "loader": {**data["loader"], "global_batch": clips}}
        }
        abstract = abstract_mesh(MeshSpec(**mesh), slice_.devices)
        try:
            one = job.changed(mesh=mesh, **loader(shares))
            fits_grid(one, mesh)
            for remat, clips in itertools.product(REMAT, (shares * 2**i for i in range(8))):
                memory = sum(least_memory(one, abstract, clips, remat).values())
                seconds = (
                    max(
                        (3 if remat == "none" else 4) * forward * clips,
                        sent(one, abstract, clips) / chip.interconnect,
                    )
                    / clips
                )
                backbone = {**e.config["model"]["backbone"], "remat": remat}
                yield {
                    "memory": memory,
                    "seconds": seconds,
                    "sections": {
                        "mesh": mesh,
                        "model": {**e.config["model"], "backbone": backbone},
                        **loader(clips),
                    },
                }
        except ValueError:  # sizes that do not divide
            continue


def fits_grid(job: Job, mesh: dict[str, int]) -> None:
    """Raises ValueError for a mesh over which heads or frames of tokens do not divide."""
    network = job.experiment.model.backbone
    frames = network.grid(job.clip)[0]
    heads = network.dims().heads if isinstance(network, Transformer) else network.heads
    if frames % mesh["context"] or heads % mesh["tensor"]:
        raise ValueError(f"{mesh}: {frames} frames of tokens, {heads} heads")


def search(job: Job, slice_: Slice, most: int) -> list[dict[str, Any]]:
    """Plans of the `most` variants that seem fastest and may fit, the fastest first, then those
    that do not fit. Of what seems equally fast the one that needs least memory comes first."""
    if job.what != "train":
        raise ConfigError("--search is for --what=train.")
    has = slice_.chip.memory
    found = sorted(variants(job, slice_), key=lambda row: (round(row["seconds"], 6), row["memory"]))
    kept = [row for row in found if row["memory"] <= has][:most]
    print(
        f"{len(found)} variants, of which {sum(r['memory'] > has for r in found)} need more than "
        f"the memory of a chip; the {len(kept)} most promising are looked at.",
        flush=True,
    )
    rows = [
        plan(job.changed(**row["sections"]), slice_)
        for row in tqdm(kept, desc="plans", unit="plan")
    ]
    return sorted(rows, key=lambda row: (not row["fits"], _per_clip(row)))


def _per_clip(row: dict[str, Any]) -> float:
    return max(row["bounds"].values()) / row["clips"] if "bounds" in row else math.inf


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


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}; options start with --.")
    with exit_on_user_error():
        lookup(FLAGS.what, PROGRAMS, "--what")
        config = resolve(FLAGS.config, sys.argv[1:])
        if given := mesh_spec():
            config["mesh"] = {"data": 1, **given}
        experiment, slice_ = Experiment(config), Slice(FLAGS.topology)
        clip, text = shapes(experiment, sizes(FLAGS.clip), FLAGS.text)
        job = Job(experiment, FLAGS.what, clip, text)
        rows = search(job, slice_, FLAGS.most) if FLAGS.search else [plan(job, slice_)]
    for row in rows[:1]:
        print(table(row, experiment.training.steps, FLAGS.price))
    if FLAGS.search:
        print(ranking(rows))
    if FLAGS.out:
        write_json(Path(FLAGS.out), rows if FLAGS.search else rows[0])


if __name__ == "__main__":
    flags.DEFINE_string(
        "config",
        None,
        "The experiment, as vdx.main takes it, with any --config.KEY=VALUE.",
        required=True,
    )
    flags.DEFINE_string(
        "topology", None, "Chips: v5e:4x4, v5p:2x2x2, v6e:2x4, h100:8, ...", required=True
    )
    flags.DEFINE_string(
        "mesh", None, "Devices along the axes, such as fsdp=8,tensor=2; default: config.mesh."
    )
    flags.DEFINE_string("what", "train", f"One of {', '.join(PROGRAMS)}.")
    flags.DEFINE_string(
        "clip",
        None,
        "Frames, height and width of a clip as the model sees it, "
        "such as 16,32,32; default: as the data has it.",
    )
    flags.DEFINE_integer(
        "text", None, "Tokens of a cached caption; default: as the data has it.", lower_bound=1
    )
    flags.DEFINE_bool("search", False, "Try meshes, remat policies and batches.")
    flags.DEFINE_integer("most", 8, "With --search: so many are compiled.", lower_bound=1)
    flags.DEFINE_float("price", None, "US dollars a chip-hour.", lower_bound=0.0)
    flags.DEFINE_string("out", None, "Write the plan to this .json file.")
    logging.set_verbosity(logging.ERROR)
    app.run(main, flags_parser=lambda argv: FLAGS([a for a in argv if not is_override(a)]))
