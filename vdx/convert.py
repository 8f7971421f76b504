"""Convert: python -m vdx.convert --source=FOLDER --out=FOLDER [--to=diffusers]

Any public model that vdx reads, a folder of diffusers, of the original Wan, or one file with the
other parts named by flags, becomes a folder in vdx's layout, which --weights of vdx.sample takes,
and from which --to=diffusers leads back.

vdx's layout is that folder with safetensors files whose keys are the paths of our parameters and
whose arrays lie as ours do, so that a share of an array on a mesh is read without a transposition,
and `safetensors` opens it anywhere. It is not a checkpoint of Orbax, because the arrays are written
one by one as they are read, in the types that they have: nothing is rounded, the way back gives
every bit, and no host holds more than one array of one layer.
"""

import sys
import time
from pathlib import Path

from absl import app, flags

from vdx.config.build import ConfigError
from vdx.interop.keymap import WeightsError
from vdx.interop.pretrained import INDEX, PretrainedModel, open_pretrained
from vdx.interop.wan_original import PLACES, open_original

FLAGS = flags.FLAGS
PARTS = tuple(part for part in PLACES if part != "transformer")


def open_source(source: Path, given: dict[str, str]) -> PretrainedModel:
    """Raises WeightsError for what is no model, or for parts that a whole folder does not need."""
    if not (source / INDEX).exists():
        return open_original(source, given)
    if given:
        raise WeightsError(
            f"{source} is a whole model; --{', --'.join(given)} cannot be given besides."
        )
    return open_pretrained(source)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}; options start with --.")
    if not FLAGS.source or not FLAGS.out:
        raise app.UsageError("Give --source and --out.")
    start = time.perf_counter()
    try:
        given = {part: where for part in PARTS if (where := getattr(FLAGS, part))}
        model = open_source(Path(FLAGS.source), given)
        for name, part in model.components.items():
            print(f"{name}: {part.size / 1e6:,.1f}M parameters", flush=True)
        model.save(Path(FLAGS.out), own=FLAGS.to == "vdx")
    except (ConfigError, WeightsError) as error:
        sys.exit(f"vdx.convert: {error}")
    print(f"Wrote {FLAGS.out} ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    flags.DEFINE_string("source", None, "A folder, or the file of a transformer.")
    flags.DEFINE_string("out", None, "A new folder.")
    flags.DEFINE_enum("to", "vdx", ["vdx", "diffusers"], "The layout to write.")
    for part in PARTS:
        flags.DEFINE_string(part, None, f"Where the {part} is, if not in --source.")
    app.run(main)
