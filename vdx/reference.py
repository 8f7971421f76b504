"""Write the reference of config keys, docs/config.md.

    python -m vdx.reference --out=docs/config.md

The text is generated from the classes that configs fill, so it cannot differ from the code.
"""

from pathlib import Path

from absl import flags

from vdx.config.reference import Section, render
from vdx.config.sections import DataSection, ExperimentSections, ModelSection, TrainSection
from vdx.data.pipeline import Loader
from vdx.data.sources import SOURCES
from vdx.data.transforms import ClipSampling
from vdx.diffusion.losses import LOSS_TERMS, WEIGHTINGS
from vdx.diffusion.process import PROCESSES
from vdx.diffusion.time_sampling import TIME_SAMPLERS
from vdx.evaluation.table import EVALUATORS
from vdx.generate.generator import Sampling
from vdx.models.adapters.lora import Lora
from vdx.models.conditioning.table import SIGNALS
from vdx.models.denoiser import BACKBONES
from vdx.models.encoders.text import ENCODERS, FROZEN
from vdx.models.mixers.table import MIXERS
from vdx.output_paths import check_output_file
from vdx.parallel import MeshSpec
from vdx.programs import run_program
from vdx.train.optim import Optimizer

FLAGS = flags.FLAGS
TITLE = """# Reference of config keys

<!-- Written by `python -m vdx.reference --out=docs/config.md`; do not edit. -->

A config is a Python file with `get_config(variant="") -> ConfigDict` (`configs/`). Any key can be
set on the command line: `--config.train.steps=100`. An unknown key or a wrong type fails at the
start, with the nearest known key. A section that is a row of a table is written
`{"name": ROW, **keys}`."""

SECTIONS = [
    Section("config", ExperimentSections, "The top level."),
    Section("config.data", DataSection),
    Section("config.data.source", SOURCES, "A row of SOURCES, named by `name`."),
    Section("config.data.clip", ClipSampling),
    Section("config.data.loader", Loader, given=("seed",)),
    Section("config.model", ModelSection),
    Section("config.model.backbone", BACKBONES, "A row of BACKBONES, named by `name`."),
    Section(
        "config.model.backbone.pattern",
        MIXERS,
        "The name of a pattern, or a list of rows of MIXERS, each a name or `{name, **keys}`.",
        given=("heads", "dtype", "width"),
    ),
    Section(
        "config.model.signals",
        SIGNALS,
        "Rows of SIGNALS by name, each with its keys.",
        given=("width",),
    ),
    Section(
        "config.model.signals.text.encoder",
        {**ENCODERS, **FROZEN},
        "A row of ENCODERS (trained; signal `text`) or FROZEN (signal `embeddings`).",
    ),
    Section("config.process", PROCESSES, "A row of PROCESSES, named by `name`."),
    Section("config.time_sampler", TIME_SAMPLERS, "A row of TIME_SAMPLERS, named by `name`."),
    Section(
        "config.loss", LOSS_TERMS, "Rows of LOSS_TERMS by name; their weighted sum is trained."
    ),
    Section("config.loss.denoising.weighting", WEIGHTINGS, "A row of WEIGHTINGS, named by `name`."),
    Section("config.optim", Optimizer),
    Section("config.mesh", MeshSpec),
    Section("config.train", TrainSection),
    Section("config.sample", Sampling),
    Section("config.eval", EVALUATORS, "Rows of EVALUATORS by name; `null` turns a row off."),
    Section("config.lora", Lora),
]


def main() -> None:
    """Write the reference to --out."""
    path = Path(FLAGS.out)
    check_output_file(path, "out", (".md",))
    path.write_text(render(TITLE, SECTIONS), encoding="utf-8")
    print(f"Wrote {path}")


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string("out", "docs/config.md", "The Markdown file to write.")


if __name__ == "__main__":
    run_program(main, define_flags)
