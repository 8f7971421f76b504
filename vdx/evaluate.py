"""Judge: python -m vdx.evaluate --workdir=runs/tiny

Prompt following: clips are drawn for held-out prompts, whose combinations of attributes never
occurred in training, and read back from pixels. Writes `eval.json`, `eval/*.mp4`, the first
twelve of them as one picture `eval/wall.webp`, and the report.
"""

from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from vdx.build import ConfigError
from vdx.data.scenes import Scenes
from vdx.data.sources import SOURCES
from vdx.experiment import Experiment, load, open_params
from vdx.files import write_json
from vdx.generate.video_io import to_uint8
from vdx.generate.wall import write_clips, write_sheet
from vdx.metrics.prompt_following import ATTRIBUTES, score
from vdx.metrics.report import write_report
from vdx.types import Params

FLAGS = flags.FLAGS
SEED = 10_000     # of the first judged clip; training's wall uses 0, 1, ...


def judge(experiment: Experiment, params: Params, workdir: Path, step: int) -> dict:
    """Scores `config.judge.prompts` held-out prompts; returns what `eval.json` says."""
    # Asked before it is made: a stranger's config could point it at any folder.
    if SOURCES.get(str(experiment.data.source.get("name"))) is not Scenes:
        raise ConfigError("Prompt following needs data whose truth is known (source 'scenes'). "
                          "Set config.judge.prompts = 0 for other data.")
    source = experiment.source(heldout=True)
    count, (frames, fps) = experiment.judging.prompts, experiment.clip_default()
    records = [source[i] for i in range(count)]
    prompts = [r.caption for r in records]
    vocabulary = {"colours": source.colours, "shapes": source.shapes, "motions": source.motions}
    seeds = [SEED + i for i in range(count)]
    videos = to_uint8(experiment.generator()(params, prompts, seeds, num_frames=frames, fps=fps))
    truth = [{k: r.attributes[k] for k in ATTRIBUTES} for r in records]
    times = np.arange(frames) / fps
    drawn = score(videos, truth, fps, **vocabulary)
    true = score([r.read(times) for r in records], truth, fps, **vocabulary)
    rows = [{"prompt": p, "seed": s, "truth": t, "read": r, "ok": t == r} for p, s, t, r in
            zip(prompts, seeds, truth, drawn["readings"], strict=True)]
    sampling = experiment.sampling
    result = {"step": step, "prompts": count, "sampler": sampling.sampler,
              "steps": sampling.steps, "guidance": sampling.guidance,
              "scores": drawn["accuracy"], "chance": drawn["chance"],
              "true_renders": true["accuracy"], "confusion": confusion(truth, drawn["readings"])}
    if jax.process_index() == 0:
        rows = write_clips(workdir / "eval", videos, fps, rows)
        write_sheet(workdir / "eval" / "wall.webp", videos[:12], prompts[:12], fps)
        result["examples"] = [{**row, "file": f"eval/{row['file']}"} for row in rows]
        write_json(workdir / "eval.json", result)
    return result


def confusion(truth: list[dict], read: list[dict]) -> dict[str, dict[str, dict[str, int]]]:
    """For each attribute {what was asked: {what was read: clips}}."""
    out: dict = {name: {} for name in ATTRIBUTES}
    for wanted, got in zip(truth, read, strict=True):
        for name in ATTRIBUTES:
            row = out[name].setdefault(wanted[name], {})
            row[got[name]] = row.get(got[name], 0) + 1
    return out


def table(result: dict) -> str:
    """The scores as lines of text."""
    lines = [f"{result['prompts']} held-out prompts, step {result['step']}, {result['sampler']} "
             f"{result['steps']} steps, guidance {result['guidance']:g}",
             f"{'':8} {'model':>8} {'chance':>8} {'reader on true renders':>24}"]
    lines += [f"{name:8} {value:8.1%} {result['chance'][name]:8.1%} "
              f"{result['true_renders'][name]:24.1%}" for name, value in result["scores"].items()]
    return "\n".join(lines)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}; options start with --.")
    workdir = Path(FLAGS.workdir)
    experiment = load(workdir)
    mesh = experiment.mesh_spec.make()
    with jax.set_mesh(mesh):
        params, step, _ = open_params(experiment, workdir, mesh, step=FLAGS.step)
        print(table(judge(experiment, params, workdir, step)))
    print(f"Open {write_report(workdir)}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The workdir of a run of vdx.main.", required=True)
    flags.DEFINE_string("step", None, 'A step, or "best"; default: the newest that verifies.')
    logging.set_verbosity(logging.WARNING)
    app.run(main)
