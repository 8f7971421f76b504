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

import sys
from pathlib import Path

from absl import app, flags, logging

from vdx.config.build import ConfigError, lookup
from vdx.config.loader import is_override, resolve
from vdx.experiment import Experiment
from vdx.files import write_json
from vdx.main import exit_on_user_error
from vdx.planning.estimate import PROGRAMS, Job, Slice, plan
from vdx.planning.search import search
from vdx.planning.table import ranking, table
from vdx.sample import mesh_spec

FLAGS = flags.FLAGS


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
