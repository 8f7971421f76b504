"""Convert a pretrained model between layouts.

    python -m vdx.convert --source=FOLDER --out=FOLDER [--to=diffusers]

Any pretrained model that vdx reads becomes a folder in vdx's layout, which --weights of vdx.sample
takes. The source is a folder of diffusers, of the original Wan, or one file with the other parts
named by flags. --to=diffusers leads back.

vdx's layout is that of diffusers with other safetensors files: their keys are the paths of our
parameters, and their arrays have our layout. A shard of an array on a mesh is therefore read
without a transposition, and `safetensors` opens the files anywhere. It is not a checkpoint of
Orbax, because the arrays are written one at a time as they are read, in the dtypes that they have:
nothing is rounded, the way back gives every bit, and no host holds more than one array of one
layer.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from absl import flags

from vdx.files import printable
from vdx.interop.keymap import WeightsError
from vdx.interop.pretrained import INDEX, PretrainedModel, open_pretrained
from vdx.interop.save import empty_folder
from vdx.interop.wan_original import LOCATIONS, open_original
from vdx.output_paths import check_output_folder
from vdx.programs import run_program

FLAGS = flags.FLAGS
PARTS = tuple(part for part in LOCATIONS if part != "transformer")


def open_source(source: Path, given: Mapping[str, str | Path]) -> PretrainedModel:
    """Open the model in a folder or file, whichever layout it has.

    given: where other parts are, by the names of PARTS. Raises WeightsError for a source that is no
    model, and for parts that a whole folder does not need.
    """
    if not (source / INDEX).exists():
        return open_original(source, given)
    if given:
        raise WeightsError(
            f"{source} is a whole model; --{', --'.join(given)} cannot be given besides."
        )
    return open_pretrained(source)


def main() -> None:
    """Convert the model that the flags name."""
    started = time.perf_counter()
    out = Path(FLAGS.out)
    check_output_folder(out, "out")
    empty_folder(out)

    locations = {part: getattr(FLAGS, part) for part in PARTS}
    given = {part: location for part, location in locations.items() if location}
    model = open_source(Path(FLAGS.source), given)
    for name, component in model.components.items():
        print(f"{name}: {component.size / 1e6:,.1f}M parameters", flush=True)
    model.save(out, own=FLAGS.to == "vdx")
    print(f"Wrote {printable(FLAGS.out)} ({time.perf_counter() - started:.1f} s)")


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string("source", None, "A folder, or the file of a transformer.")
    flags.DEFINE_string("out", None, "A new folder.")
    flags.DEFINE_enum("to", "vdx", ["vdx", "diffusers"], "The layout to write.")
    for part in PARTS:
        flags.DEFINE_string(part, None, f"Where the {part} is, if not in --source.")


if __name__ == "__main__":
    run_program(main, define_flags, required=("source", "out"))
