"""What each way to model time costs, and what it gives for the same compute.

    python benchmarks/temporal.py growth --out=benchmarks/temporal_growth.json
    python benchmarks/temporal.py train --out=runs/temporal --flops=2e13

growth: forward and backward pass of one clip as its frames grow: FLOPs and temporary memory by
XLA's cost analysis of the compiled program, and the median time of five runs; with the exponents
of the fits. train: the patterns trained side by side on scenes, each for as many steps as the
same number of FLOPs pays for, and evaluated: prompts, flicker, drift of the subject, motion.
"""

import functools
import json
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from vdx.config.loader import resolve
from vdx.data.motion import motion_score
from vdx.evaluation.run import evaluate_run
from vdx.experiment import Experiment, load
from vdx.files import read_json, write_json
from vdx.generate.sample_grid import write_sheet
from vdx.generate.video_io import to_uint8
from vdx.main import run
from vdx.metrics.temporal_consistency import flicker, identity_drift
from vdx.metrics.tracking import track_object
from vdx.models.denoiser import Denoiser
from vdx.models.transformer import Transformer
from vdx.train.preemption import PreemptionHandler
from vdx.types import Ports
from vdx.weights import open_params

FLAGS = flags.FLAGS
# Name -> pattern; two blocks each, so that all have the same depth.
PATTERNS = {
    "full attention": ("full", "full"),
    "space + time attention": ("space", "time"),
    "space + causal time": ("space", {"name": "time", "block": 1}),
    "space + convolution": ("space", {"name": "conv", "kernel": (3, 1, 1)}),
    "(2+1)D convolution": ({"name": "conv", "separable": True},) * 2,
    "space + recurrence": ("space", "recurrent"),
    "space + recurrence, both ways": ("space", {"name": "recurrent", "bidirectional": True}),
    "independent frames": ("space", "none"),
}
FRAMES, SIDE, WIDTH, DEPTH, HEADS = (4, 8, 16, 32, 64), 12, 128, 2, 4
CLIPS = 24  # clips of validation prompts that are measured for flicker and drift
SHEET_ROWS = 3  # of these in the contact sheet, under one another


def loss(model: Transformer, params, x):
    return jnp.square(model.apply(params, x, jnp.ones(1), Ports())).mean()


def growth(out: Path) -> None:
    """144 tokens a frame, width 128, two blocks."""
    rows = []
    for name, pattern in PATTERNS.items():
        model = Transformer(
            channels=4, width=WIDTH, depth=DEPTH, heads=HEADS, patch=(1, 1, 1), pattern=pattern
        )
        params = jax.jit(model.init)(
            jax.random.key(0), jnp.zeros((1, 2, SIDE, SIDE, 4)), jnp.zeros(1), Ports()
        )
        step = jax.jit(jax.grad(functools.partial(loss, model)))
        for frames in FRAMES:
            x = jnp.ones((1, frames, SIDE, SIDE, 4))
            compiled = step.lower(params, x).compile()
            cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
            jax.block_until_ready(compiled(params, x))
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                jax.block_until_ready(compiled(params, x))
                times.append(time.perf_counter() - begin)
            rows.append(
                {
                    "method": name,
                    "frames": frames,
                    "gflop": cost["flops"] / 1e9,
                    "mib": memory.temp_size_in_bytes / 2**20,
                    "seconds": statistics.median(times),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    fits = {}
    for name in PATTERNS:
        mine = [row for row in rows if row["method"] == name]
        far = np.log([row["frames"] for row in mine])
        fits[name] = {
            key: float(np.polyfit(far, np.log([row[key] for row in mine]), 1)[0])
            for key in ("gflop", "mib", "seconds")
        }
    write_json(
        out,
        {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "rows": rows,
            "exponents": fits,
        },
    )
    print(growth_table(read_json(out)))


def growth_table(result: dict) -> str:
    lines = [
        "| method | GFLOP at 4, 16, 64 frames | MiB | seconds | exponents of these |",
        "|---|---|---|---|---|",
    ]
    for name, fit in result["exponents"].items():
        mine = {row["frames"]: row for row in result["rows"] if row["method"] == name}
        cells = [
            ", ".join(f"{mine[n][key]:{form}}" for n in (4, 16, 64))
            for key, form in (("gflop", ".3g"), ("mib", ".0f"), ("seconds", ".2g"))
        ]
        cells.append(", ".join(f"{fit[k]:.2f}" for k in ("gflop", "mib", "seconds")))
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def config_of(pattern, steps: int) -> dict:
    """t2v_tiny with tokens of two frames, so that there is time to model."""
    config = resolve(
        "configs/t2v_tiny.py",
        [
            "--config.data.clip.num_frames=8",
            "--config.data.clip.fps=8.0",
            "--config.model.backbone.patch=(2,8,8)",
            "--config.model.backbone.depth=4",
            f"--config.model.backbone.pattern={pattern!r}",
            f"--config.train.steps={steps}",
            "--config.eval={'loss': None}",
            "--config.train.sample_every=0",
            f"--config.train.save_every={steps}",
        ],
    )
    for name in ("fps", "num_frames"):
        del config["model"]["signals"][name]
    return config


def train(out: Path) -> None:
    """Train every pattern, or continue where it stopped, and evaluate it."""
    rows = []
    sheet = []
    for name, pattern in PATTERNS.items():
        flops = model_flops(pattern)
        steps = round(FLAGS.flops / flops / 50) * 50
        workdir = out / re.sub("[^a-z0-9]+", "-", name).strip("-")
        begin = time.perf_counter()
        with PreemptionHandler() as stop:
            run(config_of(pattern, steps), workdir, stop)
        seconds = time.perf_counter() - begin
        scores, clips = evaluate(workdir)
        rows.append(
            {
                "method": name,
                "gflop_a_step": flops / 1e9,
                "steps": steps,
                "seconds": seconds,
                **scores,
            }
        )
        sheet.append(clips[:SHEET_ROWS])
        print(json.dumps(rows[-1]), flush=True)
        write_json(out / "temporal_train.json", rows)
    write_sheet(
        out / "sample_grid.webp",
        np.stack(sheet, 1).reshape(-1, *sheet[0].shape[1:]),
        [*PATTERNS] * SHEET_ROWS,
        8.0,
        columns=len(PATTERNS),
        side=96,
    )
    print(train_table(rows))


def model_flops(pattern) -> float:
    """Of one training step of 24 clips: three forward passes' worth."""
    model = config_of(pattern, 1)["model"]
    return 3 * 24 * Denoiser(model["backbone"], model["signals"]).flops((8, 32, 32, 3))


def evaluate(workdir: Path) -> tuple[dict, np.ndarray]:
    """Return scores of 96 validation prompts, and the first clips of them."""
    rows = {"loss": None, "prompt_following": {"prompts": 96}}
    experiment = Experiment({**load(workdir).config, "eval": rows})
    mesh = experiment.mesh_spec.make()
    source = experiment.source(validation=True)
    frames, fps = experiment.clip_default()
    records = [source[i] for i in range(CLIPS)]
    with jax.set_mesh(mesh):
        params, step, _ = open_params(experiment, workdir, mesh)
        following = evaluate_run(experiment, params, workdir, step)["prompt_following"]
        clips = to_uint8(
            experiment.generator()(
                params,
                [record.caption for record in records],
                list(range(CLIPS)),
                num_frames=frames,
                fps=fps,
            )
        )
    true = [record.read(np.arange(frames) / fps) for record in records]
    scores = {f"prompts_{name}": share for name, share in following["scores"].items()}
    scores |= consistency(list(clips), fps)
    scores |= {f"true_{name}": value for name, value in consistency(true, fps).items()}
    return scores, clips


def consistency(clips: list[np.ndarray], fps: float) -> dict[str, float]:
    """Return flicker, drift, jumps, the share of clips with a subject, and motion.

    Jumps are the pixels by which the object's centre leaves the middle of its places in the
    frames before and after.
    """
    drifts = []
    jumps = []
    for clip in clips:
        track = track_object(clip)
        if track is None:
            continue
        masks = track.amount > 0.5
        drifts.append(identity_drift(clip, masks).value)
        path = np.stack([np.argwhere(mask).mean(0) for mask in masks if mask.any()])
        with np.errstate(invalid="ignore"):
            jumps.append(np.linalg.norm(np.diff(path, 2, axis=0), axis=-1).mean() / 2)
    return {
        "flicker": mean([flicker(clip).value for clip in clips]),
        "drift": mean(drifts),
        "jumps": mean(jumps),
        "subject_found": len(drifts) / len(clips),
        "motion": mean([motion_score(clip, fps) for clip in clips]),
    }


def mean(values: list[float]) -> float:
    return float(np.nanmean(values)) if values else float("nan")


def train_table(rows: list[dict]) -> str:
    lines = [
        "| method | steps | prompts: colour, shape, motion, all | flicker, levels | "
        "jumps, px | drift | motion |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = ", ".join(
            f"{100 * row[f'prompts_{k}']:.0f}" for k in ("colour", "shape", "motion", "all")
        )
        lines.append(
            f"| {row['method']} | {row['steps']} | {share} % | {row['flicker']:.2f} | "
            f"{row['jumps']:.2f} | {row['drift']:.3f} | {row['motion']:.1f} |"
        )
    first = rows[0]
    lines.append(
        f"| true renders | | | {first['true_flicker']:.2f} | {first['true_jumps']:.2f} | "
        f"{first['true_drift']:.3f} | {first['true_motion']:.1f} |"
    )
    return "\n".join(lines)


def main(argv):
    what = {"growth": growth, "train": train}
    if len(argv) != 2 or argv[1] not in what:
        raise app.UsageError(f"Say one of: {', '.join(what)}.")
    what[argv[1]](Path(FLAGS.out))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "growth: a .json file; train: a folder.", required=True)
    flags.DEFINE_float("flops", 2e13, "train: matrix products that each method may spend.")
    app.run(main)
