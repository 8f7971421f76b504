"""Generate: python -m vdx.sample --workdir=runs/tiny --prompt="a red circle moves right" \\
    --out=out.mp4

Beside the mp4 a JSON manifest holds all that went into it: `--from_manifest=out.json` makes the
same clip again, bit for bit on the same machine. `--prompts_file` has one prompt a line, and
--out is then a folder.
"""

import dataclasses
import hashlib
import platform
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

import vdx
from vdx.build import fill, lookup
from vdx.diffusion.samplers import SAMPLERS
from vdx.experiment import Experiment, load, open_params
from vdx.files import read_json, write_json
from vdx.generate.pipeline import Sampling
from vdx.generate.video_io import to_uint8, write_video
from vdx.generate.wall import write_clips
from vdx.types import Params

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Request:
    """All that decides the clips of one call, besides the weights."""

    prompts: tuple[str, ...]
    seed: int            # clip i takes seed + i
    num_frames: int
    fps: float
    sampling: dict

    def draw(self, experiment: Experiment, params: Params) -> np.ndarray:
        """float32 [n t h w c]."""
        sampling = fill(Sampling, self.sampling, "sampling")
        seeds = [self.seed + i for i in range(len(self.prompts))]
        return experiment.generator(sampling)(params, self.prompts, seeds,
                                              num_frames=self.num_frames, fps=self.fps)


def from_flags(experiment: Experiment) -> Request:
    """A request from the command line; what is not given is as the model was trained."""
    if (FLAGS.prompt is None) == (FLAGS.prompts_file is None):
        raise app.UsageError("Give one of --prompt, --prompts_file and --from_manifest.")
    if FLAGS.prompts_file:
        lines = Path(FLAGS.prompts_file).read_text().splitlines()
        prompts = tuple(p for line in lines if (p := line.strip()))
    else:
        prompts = (FLAGS.prompt,)
    if not prompts:
        raise app.UsageError(f"{FLAGS.prompts_file} holds no prompt.")
    given = {k: v for k in ("sampler", "steps", "guidance") if (v := getattr(FLAGS, k)) is not None}
    frames, fps = experiment.clip_default()
    return Request(prompts, FLAGS.seed, FLAGS.num_frames or frames, FLAGS.fps or fps,
                   {**dataclasses.asdict(experiment.sampling), **given})


@dataclasses.dataclass(frozen=True)
class Weights:
    """Which weights a manifest's clips were made with."""

    workdir: str
    step: int
    item: str
    identity: str


def write(request: Request, videos: np.ndarray, out: Path, weights: Weights) -> None:
    """One prompt: out.mp4 and out.json. Several: a folder of clips and its manifest.json."""
    pixels = to_uint8(videos)
    manifest = {"request": dataclasses.asdict(request), "weights": dataclasses.asdict(weights),
                "versions": {"vdx": vdx.__version__, "jax": jax.__version__,
                             "python": platform.python_version()},
                "device": jax.devices()[0].device_kind,
                "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
    if len(pixels) == 1 and out.suffix:
        write_video(out, pixels[0], request.fps)
        write_json(out.with_suffix(".json"), manifest)
        return
    rows = [{"prompt": p, "seed": request.seed + i} for i, p in enumerate(request.prompts)]
    manifest["clips"] = write_clips(out, pixels, request.fps, rows)
    write_json(out / "manifest.json", manifest)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}; options start with --.")
    out, workdir = Path(FLAGS.out), FLAGS.workdir
    if workdir is None:     # also with a manifest: a stranger's could name any folder
        raise app.UsageError("Give --workdir, the workdir of a run of vdx.main.")
    manifest = read_json(FLAGS.from_manifest) if FLAGS.from_manifest else None
    if manifest and not {"request", "weights"} <= set(manifest):
        raise app.UsageError(f"{FLAGS.from_manifest} is not a manifest of vdx.sample.")
    experiment = load(Path(workdir))
    request = fill(Request, manifest["request"], "manifest") if manifest else from_flags(experiment)
    if len(request.prompts) > 1 and out.suffix:
        raise app.UsageError(f"{len(request.prompts)} prompts need a folder: --out={out.stem}")
    lookup(request.sampling["sampler"], SAMPLERS, "--sampler")

    mesh = experiment.mesh_spec.make()
    with jax.set_mesh(mesh):
        item, step = "ema" if FLAGS.averaged else "params", FLAGS.step
        if made := fill(Weights, manifest["weights"], "manifest.weights") if manifest else None:
            item, step = made.item, made.step
        params, step, identity = open_params(experiment, Path(workdir), mesh, item=item, step=step)
        weights = Weights(str(workdir), step, item, identity)
        if made and made.identity != identity:
            raise app.UsageError(
                f"The weights in {workdir} at step {step} are not those of the manifest; the clip "
                "cannot be made again from them.")
        videos = request.draw(experiment, params)
    if jax.process_index() == 0:
        write(request, videos, out, weights)
        if FLAGS.save_array:
            np.save(FLAGS.save_array, videos)
        print(f"Wrote {out}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The workdir of a run of vdx.main.")
    flags.DEFINE_string("prompt", None, "What to show.")
    flags.DEFINE_string("prompts_file", None, "A text file, one prompt a line.")
    flags.DEFINE_string("from_manifest", None, "Make the clips of this manifest again.")
    flags.DEFINE_string("step", None, 'A step, or "best"; default: the newest that verifies.')
    flags.DEFINE_bool("averaged", True, "The averaged weights, or those of the step itself.")
    flags.DEFINE_string("out", "out.mp4", "An mp4, or a folder for several prompts.")
    flags.DEFINE_string("save_array", None, "Also save float32 [n t h w c] in [-1, 1] as .npy.")
    flags.DEFINE_integer("seed", 0, "Clip i takes seed + i.")
    flags.DEFINE_string("sampler", None, f"One of {', '.join(SAMPLERS)}.")
    flags.DEFINE_integer("steps", None, "Sampler steps.", lower_bound=1)
    flags.DEFINE_float("guidance", None, "Scale of classifier-free guidance; 1 is none.")
    flags.DEFINE_integer("num_frames", None, "Frames of the clip.", lower_bound=1)
    flags.DEFINE_float("fps", None, "Frames per second, also told to the model.", lower_bound=0.1)
    logging.set_verbosity(logging.WARNING)
    app.run(main)
