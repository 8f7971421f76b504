"""Prepare a training set from footage: measure it, decide, encode clips.

    python -m vdx.prepare --source=FOLDER --out=DIR [--until=look|decide|clips] [--workers=N]
    python -m vdx.main --config=configs/t2v_folder.py --config.data.path=DIR

--source is a folder, a list of paths (.txt), or a table with the columns file_name and caption
(.jsonl, .csv, .json, .parquet). Captions are read from .txt, .json, .srt and .vtt files with the
name of the video, and from tables. Any setting of --config is changed by --config.KEY=VALUE. A
killed run is continued by the same command. See docs/prepare.md.
"""

import sys
from pathlib import Path

from absl import app, flags

from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.config.ranges import Index, define_number
from vdx.data.preparation.runner import BEAM_FOLDER, Beam, Local, Runner
from vdx.data.preparation.sources import list_sources
from vdx.data.preparation.stages import Preparation
from vdx.files import printable, write_json
from vdx.output_paths import check_output_folder
from vdx.programs import run_program
from vdx.train.preemption import lock_workdir

FLAGS = flags.FLAGS
STAGES = ("look", "decide", "clips")
BEAM = "--beam."  # flags of Apache Beam begin with it


def choose_runner(out: Path) -> Runner:
    """Return the runner that the flags name. Raises UsageError."""
    options = tuple(f"--{arg.removeprefix(BEAM)}" for arg in sys.argv if arg.startswith(BEAM))
    if FLAGS.runner == "beam":
        return Beam(options, out / "cache" / BEAM_FOLDER)
    if options:
        raise app.UsageError(f"{BEAM}* are flags of --runner=beam: give it too.")
    return Local(FLAGS.workers)


def check_apart(source: Path, out: Path) -> None:
    """Raise ConfigError if the output would be mixed with other files."""
    if source.is_dir():
        inside = out.resolve().is_relative_to(source.resolve())
        if inside or source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"--out={out} and --source={source}: neither may contain the other.")
    if out.exists() and any(out.iterdir()) and not (out / "cache").is_dir():
        raise ConfigError(f"--out={out} has other files in it: name a new folder.")


def main() -> None:
    """Prepare the footage that the flags name."""
    out = Path(FLAGS.out)
    check_output_folder(out, "out")
    check_apart(Path(FLAGS.source), out)
    config = resolve(FLAGS.config, sys.argv[1:])
    preparation = Preparation(out, config, choose_runner(out))
    until = STAGES.index(FLAGS.until)

    with lock_workdir(out / "cache"):
        preparation.remove_parts()
        sources = list_sources(Path(FLAGS.source))
        print(printable(str(sources)), flush=True)
        write_json(out / "prepare.json", config)
        looks = preparation.look(sources)
        if until >= STAGES.index("decide"):
            rows = preparation.decide(looks, sources)
        if until >= STAGES.index("clips"):
            preparation.encode_clips(rows, looks, sources)


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string("source", None, "A folder, a list of paths, or a table of files.")
    flags.DEFINE_string("out", None, "The folder of the training set.")
    flags.DEFINE_string("config", "configs/prepare.py", "Settings, with any --config.KEY=VALUE.")
    flags.DEFINE_enum("until", "clips", STAGES, "The last stage.")
    define_number("workers", 1, Index, "Processes; 0: this one.")
    flags.DEFINE_enum("runner", "local", ["local", "beam"], "What runs the work.")


if __name__ == "__main__":
    run_program(main, define_flags, required=("source", "out"), takes_config=True, passes_on=BEAM)
