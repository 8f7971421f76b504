"""Write what a run trained as files that other programs read.

    python -m vdx.export --workdir=runs/lora --out=lora.safetensors --layout=comfyui
    python -m vdx.export --workdir=runs/lora --out=lora.safetensors \\
        --weights=Wan2.1-T2V-1.3B-Diffusers --prompt="a cat walks in the rain"
    python -m vdx.export --workdir=runs/wan --out=transformer

Adapters become one file, a whole network a folder in the layout of diffusers. The weights are the
averaged ones. A model card is written next to them: lora.md, or README.md in the folder. With
prompts it shows clips that are drawn with the file and the pretrained model of --weights.
"""

from pathlib import Path

from absl import app, flags, logging

from vdx.experiment import load
from vdx.exporter import check_export, draw_clips, output_places, sample_request, write_weights
from vdx.files import printable
from vdx.generate.pretrained_pipeline import PretrainedPipeline
from vdx.interop.lora import LAYOUTS
from vdx.model_card import describe_data, write_card
from vdx.programs import run_program, start

FLAGS = flags.FLAGS


def main() -> None:
    """Export the run that the flags name."""
    check_flags()

    # Everything that may be wrong, before weights are read.
    workdir = Path(FLAGS.workdir)
    experiment = load(workdir)
    places = output_places(experiment, Path(FLAGS.out))
    check_export(experiment, FLAGS.layout, bool(FLAGS.prompt))
    start()
    pipeline = None
    if FLAGS.weights:
        pipeline = PretrainedPipeline(FLAGS.weights, log=print)
        request = sample_request(experiment, pipeline, FLAGS.prompt, FLAGS.image)

    # The weights, the clips, and the card that describes both.
    data = describe_data(experiment)
    step = write_weights(experiment, workdir, FLAGS.step, places, FLAGS.layout, data)
    if pipeline is not None:
        draw_clips(pipeline, request, places)
    write_card(experiment, places, step, FLAGS.layout, data, FLAGS.prompt)
    print(f"Wrote {printable(FLAGS.out)} of step {step}, and {printable(str(places.card))}")


def check_flags() -> None:
    """Raise UsageError for flags of sample clips that do not belong together."""
    if bool(FLAGS.prompt) != bool(FLAGS.weights) or (FLAGS.image and not FLAGS.prompt):
        raise app.UsageError(
            "--prompt and --weights go together, and --image only with them: clips of the prompts "
            "are drawn with the exported file and the pretrained model in the folder --weights."
        )
    if not all(prompt.strip() for prompt in FLAGS.prompt):
        raise app.UsageError("--prompt is empty: write what the clip shows.")


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string("workdir", None, "The workdir of a run of vdx.main.")
    flags.DEFINE_string("out", None, "A .safetensors file; of a whole network a new folder.")
    flags.DEFINE_enum("layout", "diffusers", list(LAYOUTS), "Whose names the file has.")
    flags.DEFINE_string("step", None, 'A step, or "best"; default: the newest that verifies.')
    flags.DEFINE_multi_string("prompt", [], "Of a sample clip; may be given several times.")
    flags.DEFINE_string("weights", None, "The folder of the pretrained model, for sample clips.")
    flags.DEFINE_string("image", None, "An image that the sample clips begin with.")


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    run_program(main, define_flags, required=("workdir", "out"))
