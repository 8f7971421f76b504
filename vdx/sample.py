"""Generate clips from the command line.

    python -m vdx.sample --workdir=runs/tiny --prompt="a red circle moves right" --out=out.mp4
    python -m vdx.sample --workdir=runs/tiny --prompts_file=prompts.txt --out=clips
    python -m vdx.sample --workdir=runs/tiny --from_manifest=out.json --out=again.mp4
    python -m vdx.sample --weights=FOLDER --prompt="a cat walks in the rain" --out=cat.gif

--weights is a folder of pretrained weights (docs/weights.md).

A JSON manifest next to the mp4 holds everything that went into it: `--from_manifest=out.json`
makes the same clip again, bit for bit on the same machine. `--prompts_file` has one prompt a line,
and --out is then a folder. `vdx.load` does the same from Python.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from vdx import cli
from vdx.config.ranges import Count, Fraction, NonNegative, Positive, Seed, define_number
from vdx.diffusion.samplers import SAMPLERS
from vdx.diffusion.timesteps import TIMESTEPS
from vdx.experiment import load as load_experiment
from vdx.files import atomic_write, printable
from vdx.generate.cache_calibration import FILE as CALIBRATION
from vdx.generate.clip import Pieces, check_output, check_rate, join_pieces, write_stream
from vdx.generate.manifest import read_manifest
from vdx.generate.pipeline import Pipeline
from vdx.generate.preprocess import CHOICES
from vdx.generate.pretrained_request import LORAS
from vdx.generate.request import Request
from vdx.generate.run_pipeline import RunPipeline
from vdx.load_pipeline import load, load_for_manifest
from vdx.output_paths import check_output_file, check_output_folder
from vdx.programs import run_program, start
from vdx.text_files import read_lines

FLAGS = flags.FLAGS
CALIBRATION_PROMPTS = 4  # of the run, if none are given: each is drawn about ten times
SAMPLING = ("num_frames", "fps", "sampler", "timesteps", "steps", "shift", "cache_threshold")
IMAGES = ("image", "last_image", "reference")
SIGNALS = ("flow", "camera", "actions", "motion")
PRETRAINED = ("negative_prompt", "control_mask", "init_noise", "height", "width", "preprocess")
# Flags of --workdir alone, and of --weights alone.
RUN_ONLY = ("step", "averaged", "signal_guidance", "calibrate_cache", "step_cache", *SIGNALS)
WEIGHTS_ONLY = (*PRETRAINED, *LORAS, "dtype", "mesh")
# Flags of what a manifest holds; files and the mesh may be elsewhere than they were.
IN_MANIFEST = (
    *("prompt", "prompts_file", "seed", "step", "averaged", "dtype", *SAMPLING, "height", "width"),
    *("guidance", "signal_guidance", "negative_prompt", "motion", "calibrate_cache", "step_cache"),
)


def main() -> None:
    """Draw the clips that the flags describe, or calibrate the step cache of a run."""
    check_flags()
    start()
    if FLAGS.calibrate_cache is not None:
        calibrate_cache()
    else:
        draw()


def check_flags() -> None:
    """Raise UsageError for flags that exclude each other."""
    # Also with a manifest, which never chooses a folder: one from elsewhere could name any.
    if bool(FLAGS.workdir) == bool(FLAGS.weights):
        raise app.UsageError(
            "Give --workdir, the workdir of a run of vdx.main, or --weights, a "
            "folder of pretrained weights."
        )
    kind, others = ("workdir", WEIGHTS_ONLY) if FLAGS.workdir else ("weights", RUN_ONLY)
    refuse(others, f"not with --{kind}")
    if FLAGS.from_manifest:
        refuse(IN_MANIFEST, "a manifest has them, and makes the same clips again")
    if FLAGS.calibrate_cache is not None:
        refuse(("out", "save_array", "step_cache"), "not with --calibrate_cache, which draws none")


def refuse(names: Iterable[str], reason: str) -> None:
    """Raise UsageError if any of these flags is given."""
    given = [name for name in names if FLAGS[name].present]
    if given:
        raise app.UsageError(f"--{', --'.join(given)}: {reason}.")


def draw() -> None:
    """Draw the clips and write them with their manifest."""
    out = Path(FLAGS.out)
    pipeline, request = restored(out) if FLAGS.from_manifest else requested(out)
    check_rate(out, request.fps)
    if FLAGS.step_cache and isinstance(pipeline, RunPipeline):
        request = pipeline.with_calibrated_cache(request)

    clips: Iterable[Pieces] = pipeline.stream(request, exact=bool(FLAGS.save_array))
    arrays: list[np.ndarray] = []
    if FLAGS.save_array:
        clips = collected(clips, arrays)
    if jax.process_index() > 0:  # every process takes part in decoding
        for pieces in clips:
            collections.deque(pieces, maxlen=0)
        return
    write_stream(clips, request, pipeline.weights(), out)
    if FLAGS.save_array:
        with atomic_write(FLAGS.save_array) as part:
            np.save(part, np.stack(arrays))
    print(f"Wrote {printable(FLAGS.out)}")


def check_outputs(out: Path, count: int) -> None:
    """Raise ConfigError if the clips or the array cannot be written."""
    check_output(out, count)
    if FLAGS.save_array:
        check_output_file(Path(FLAGS.save_array), "save_array", (".npy",))


def requested(out: Path) -> tuple[Pipeline[Any], Request]:
    """Return what the flags describe, after a check of the outputs."""
    options: dict[str, Any] = {}
    if FLAGS.workdir:
        options = {"step": FLAGS.step, "averaged": FLAGS.averaged}
    else:
        options = {"dtype": FLAGS.dtype, "mesh": cli.parse_mesh(FLAGS.mesh), "log": log()}
    prompts = read_prompts()
    given = settings()
    check_outputs(out, len(prompts))
    pipeline = load(FLAGS.workdir or FLAGS.weights, **options)
    check_kind(pipeline)
    return pipeline, pipeline.request(prompts, seed=FLAGS.seed, **given)


def restored(out: Path) -> tuple[Pipeline[Any], Request]:
    """Return the pipeline and the request of a manifest; flags name moved files."""
    manifest = read_manifest(FLAGS.from_manifest)
    check_outputs(out, len(manifest["request"]["prompts"]))
    mesh = cli.parse_mesh(FLAGS.mesh)
    pipeline = load_for_manifest(FLAGS.workdir or FLAGS.weights, manifest, mesh, log())
    check_kind(pipeline)
    files = ("control", "control_mask", "init_noise", *LORAS, *IMAGES, *SIGNALS)
    given = settings()
    moved = {name: given[name] for name in files if name in given}
    if mesh:
        moved["mesh"] = mesh
    return pipeline, pipeline.restore(manifest, **moved)


def check_kind(pipeline: Pipeline[Any]) -> None:
    """Raise UsageError for a run as --weights, or pretrained weights as --workdir."""
    if isinstance(pipeline, RunPipeline) != bool(FLAGS.workdir):
        given, right = ("workdir", "weights") if FLAGS.workdir else ("weights", "workdir")
        raise app.UsageError(f"{pipeline.where} is no --{given}: give it as --{right}.")


def settings() -> dict[str, Any]:
    """Return the settings of a request; what is not given is the model's default."""
    given = cli.given_flags(*SAMPLING, *IMAGES)
    given["guidance"] = cli.parse_guidance(FLAGS.guidance)
    if FLAGS.workdir:
        given |= cli.given_flags(*SIGNALS) | cli.parse_control_maps(FLAGS.control)
        given["signal_guidance"] = cli.parse_signal_guidance(FLAGS.signal_guidance)
    else:
        given |= cli.given_flags("control", *PRETRAINED)
        lists = cli.given_flags("reference", *LORAS)
        given |= {name: cli.parse_list(text) for name, text in lists.items()}
    return {name: value for name, value in given.items() if value is not None}


def read_prompts() -> list[str]:
    """Return the prompts of --prompt or --prompts_file.

    Raises UsageError, and what `read_lines` raises for a file that is no text.
    """
    if (FLAGS.prompt is None) == (FLAGS.prompts_file is None):
        raise app.UsageError("Give one of --prompt, --prompts_file and --from_manifest.")
    if FLAGS.prompt is not None:
        if not FLAGS.prompt.strip():
            raise app.UsageError("--prompt is empty: write what the clip shows.")
        return [FLAGS.prompt]
    lines = [line.strip() for line in read_lines(FLAGS.prompts_file)]
    prompts = [line for line in lines if line]
    if not prompts:
        raise app.UsageError(f"{FLAGS.prompts_file} has no prompt: expected one a line.")
    return prompts


def collected(clips: Iterable[Pieces], arrays: list[np.ndarray]) -> Iterator[Pieces]:
    """Yield the same clips, and append each as an array [t h w 3] to `arrays`."""
    for pieces in clips:
        arrays.append(join_pieces(pieces))
        yield [arrays[-1]]


def log() -> Callable[[str], None]:
    """Return `print` on the first process, a function without effect on others."""
    return print if jax.process_index() == 0 else lambda line: None


def calibrate_cache() -> None:
    """Find the threshold of the step cache of a run, and write it into the workdir."""
    workdir = Path(FLAGS.workdir)
    check_output_folder(workdir, "workdir")
    if FLAGS.prompt or FLAGS.prompts_file:
        prompts = read_prompts()
    else:
        prompts = list(load_experiment(workdir).sample_prompts[:CALIBRATION_PROMPTS])
    pipeline = load(workdir, step=FLAGS.step, averaged=FLAGS.averaged)
    assert isinstance(pipeline, RunPipeline)  # load_experiment or check_flags has refused others
    request = pipeline.request(prompts, seed=FLAGS.seed, **settings())
    calibration = pipeline.calibrate_cache(request, FLAGS.calibrate_cache, log())
    if jax.process_index() == 0:
        calibration.save(workdir)
        print(f"{calibration.summary()}\nWrote {workdir / CALIBRATION}; --step_cache uses it.")


def define_flags() -> None:
    """Define the flags; without a default they have that of the model."""
    text = flags.DEFINE_string
    text("workdir", None, "The workdir of a run of vdx.main.")
    text("weights", None, "A folder of diffusers, or written by vdx.convert.")
    text("prompt", None, "What the clip shows.")
    text("prompts_file", None, "A text file, one prompt a line.")
    text("from_manifest", None, "Make the clips of this manifest again.")
    text("step", None, 'A step, or "best"; default: the newest that verifies.')
    flags.DEFINE_bool("averaged", True, "The averaged weights, or those of the step itself.")
    text("out", "out.mp4", "An mp4, GIF or WebP, or a folder for several prompts.")
    text("save_array", None, "Also save float32 [n t h w c] in [-1, 1] as .npy.")
    types = ["float32", "bfloat16"]
    flags.DEFINE_enum("dtype", None, types, "Default: float32 on a CPU, else bfloat16.")
    text("mesh", None, "Such as fsdp=4,tensor=2; default: tensor as far as it divides the heads.")
    define_sampling_flags()
    define_condition_flags()


def define_sampling_flags() -> None:
    """Define the flags of the clip's size, of the sampler and of the step cache."""
    text = flags.DEFINE_string
    number = define_number
    number("seed", 0, Seed, "Clip i takes seed + i.")
    number("num_frames", None, Count, "Frames of the clip.")
    number("fps", None, Positive, "Frames per second; some models read it.")
    number("height", None, Count, "Pixels.")
    number("width", None, Count, "Pixels.")
    text("sampler", None, f"One of {', '.join(SAMPLERS)}.")
    rows = ", ".join(TIMESTEPS)
    text("timesteps", None, f"Times of the steps: one of {rows}; see docs/weights.md.")
    number("steps", None, Count, "Sampler steps.")
    number("shift", None, Positive, "Time shift: above 1, more steps at high noise.")
    text("guidance", None, "Scale, 1 is none; 4,3: of the experts for high and low noise.")
    text("signal_guidance", None, "Scales of other signals, such as depth=2,flow=1.5.")
    text_of_cache = "Step cache (vdx.diffusion.step_cache); 0 is exact."
    number("cache_threshold", None, NonNegative, text_of_cache)
    number(
        "calibrate_cache",
        None,
        Fraction,
        "Instead of drawing: find the largest --cache_threshold whose clips have at least this "
        f"SSIM to the exact ones, and write it to {CALIBRATION} of the workdir. Prompts: --prompt, "
        "--prompts_file, or the first sample prompts of the run.",
    )
    flags.DEFINE_bool("step_cache", False, "Use the threshold that --calibrate_cache found.")


def define_condition_flags() -> None:
    """Define the flags of conditions, adapters and noise."""
    text = flags.DEFINE_string
    text(
        "negative_prompt",
        None,
        "Guidance leads away from it; the word default: the makers' (docs/weights.md).",
    )
    text("image", None, "An image that the clip begins with.")
    text("last_image", None, "An image that it ends with.")
    ways = "How images are prepared; default: as those who made the folder do (docs/weights.md)."
    flags.DEFINE_enum("preprocess", None, CHOICES, ways)
    text("reference", None, "An image of the subject; of VACE also several: a.png,b.png.")
    text("control", None, "Of a run depth=FILE,pose=FILE (vdx.data.track_files); of VACE a video.")
    text("control_mask", None, "A video or an image, white where the control is drawn anew.")
    text("flow", None, "A .npy file [t h w 2]: pixels to the next frame.")
    text("camera", None, "A .json file of cameras in the format of vdx.data.camera.")
    text("actions", None, "One for each frame, with commas between them, or a .json file.")
    define_number("motion", None, NonNegative, "Strength of motion (vdx.data.motion).")
    text("init_noise", None, "A .npy file, float32 [b t h w c], instead of noise of the seeds.")
    text("lora", None, "LoRA files with weights: style.safetensors:0.8,other.safetensors.")
    text("lora_2", None, "The same for the second of two experts.")


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    run_program(main, define_flags)
