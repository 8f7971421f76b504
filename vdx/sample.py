"""Generate: python -m vdx.sample --workdir=runs/tiny --prompt="a red circle moves right" \\
    --out=out.mp4

or, with public weights (docs/weights.md), --weights=FOLDER instead of --workdir.

Beside the mp4 a JSON manifest holds all that went into it: `--from_manifest=out.json` makes the
same clip again, bit for bit on the same machine. `--prompts_file` has one prompt a line, and
--out is then a folder.
"""

import collections
import dataclasses
import hashlib
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

import vdx
from vdx.compilation_cache import enable_compilation_cache
from vdx.config.build import ConfigError, fill, lookup
from vdx.diffusion.samplers import SAMPLERS
from vdx.diffusion.timesteps import TIMESTEPS
from vdx.experiment import Experiment, load
from vdx.files import read_json, write_json
from vdx.generate.cache_calibration import FILE as PROOF
from vdx.generate.cache_calibration import calibrate, check_calibration, read_calibration
from vdx.generate.control_inputs import file_digest, files, read_controls
from vdx.generate.pipeline import Sampling
from vdx.generate.pretrained import PretrainedGenerator
from vdx.generate.pretrained_request import PretrainedRequest, prepare
from vdx.generate.sample_grid import write_clips
from vdx.generate.video_io import to_uint8, write_video
from vdx.interop.keymap import WeightsError
from vdx.train.checkpoint_match import CheckpointError
from vdx.types import Params
from vdx.weights import open_params

FLAGS = flags.FLAGS
# Each clip is pieces [t h w 3], uint8 or float32 in [-1, 1].
Clips = Iterable[Iterable[np.ndarray]]
CALIBRATED = 4  # prompts, if none are given
# Flags of --workdir alone, and of --weights alone.
STEER = ("flow", "camera", "actions", "motion")
TRAINED = ("step", "averaged", "signal_guidance", "calibrate_cache", "step_cache", *STEER)
PUBLIC = (
    "negative_prompt",
    "control_mask",
    "init_noise",
    "lora",
    "lora_2",
    "height",
    "width",
    "dtype",
    "mesh",
)


@dataclasses.dataclass(frozen=True)
class Request:
    """All that decides the clips of one call, besides the weights.

    steer: what is asked besides the words, as vdx.generate.control_inputs says; digests: SHA-256 of its
    files.
    """

    prompts: tuple[str, ...]
    seed: int  # clip i takes seed + i
    num_frames: int
    fps: float
    sampling: dict
    controls: dict = dataclasses.field(default_factory=dict)
    digests: dict = dataclasses.field(default_factory=dict)

    def draw(
        self, experiment: Experiment, params: Params, controls: dict[str, np.ndarray]
    ) -> np.ndarray:
        """float32 [n t h w c]. steer: what `steered` gives."""
        sampling = fill(Sampling, self.sampling, "sampling")
        n, generator = len(self.prompts), experiment.generator(sampling)
        return generator(
            params,
            self.prompts,
            [self.seed + i for i in range(n)],
            num_frames=self.num_frames,
            fps=self.fps,
            controls={name: np.repeat(value, n, 0) for name, value in controls.items()},
        )

    def read_controls(self, experiment: Experiment) -> dict[str, np.ndarray]:
        """Entries of a batch of one clip. Raises ConfigError."""
        for name, path in files(self.controls).items():
            if file_digest(name, path) != self.digests.get(name):
                raise ConfigError(f"--{name}={path} is not the file of the request any more.")
        shape = (
            self.num_frames,
            experiment.data.height,
            experiment.data.width,
            experiment.model.channels,
        )
        return read_controls(
            self.controls,
            experiment.model.signals,
            shape,
            self.fps,
            experiment.objective.mean,
            experiment.clip.flow_points if experiment.clip else 0,
            experiment.objective.first_frame > 0,
        )


@dataclasses.dataclass(frozen=True)
class Weights:
    """Which weights of a run a manifest's clips were made with."""

    workdir: str
    step: int
    item: str
    identity: str


@dataclasses.dataclass(frozen=True)
class PretrainedWeights:
    """The same for public weights."""

    weights: str
    identity: str


def prompts() -> tuple[str, ...]:
    if (FLAGS.prompt is None) == (FLAGS.prompts_file is None):
        raise app.UsageError("Give one of --prompt, --prompts_file and --from_manifest.")
    if FLAGS.prompt is not None:
        return (FLAGS.prompt,)
    lines = Path(FLAGS.prompts_file).read_text().splitlines()
    if not (found := tuple(p for line in lines if (p := line.strip()))):
        raise app.UsageError(f"{FLAGS.prompts_file} holds no prompt.")
    return found


def guidance() -> tuple[float, ...] | None:
    try:
        return FLAGS.guidance and tuple(float(g) for g in FLAGS.guidance.split(","))
    except ValueError as error:
        raise app.UsageError(
            f"--guidance={FLAGS.guidance} is not a number, or two with a comma between them."
        ) from error


def mesh_spec() -> dict[str, int] | None:
    try:
        sizes = [part.split("=") for part in FLAGS.mesh.split(",")] if FLAGS.mesh else []
        return {axis: int(size) for axis, size in sizes} or None
    except ValueError as error:
        raise app.UsageError(f"--mesh={FLAGS.mesh} is not like fsdp=4,tensor=2.") from error


def controls() -> dict[str, str]:
    """The dense maps of --control."""
    pairs = [part.partition("=") for part in FLAGS.control.split(",")] if FLAGS.control else []
    if wrong := ["".join(p) for p in pairs if p[0] not in ("depth", "pose", "flow") or not p[2]]:
        raise app.UsageError(f"--control={wrong[0]} is not like depth=FILE or pose=FILE.")
    return {name: path for name, _, path in pairs}


def scales() -> dict[str, float]:
    """The guidance scales of --signal_guidance."""
    try:
        return {
            name: float(value)
            for part in FLAGS.signal_guidance.split(",")
            for name, value in [part.split("=")]
        }
    except ValueError as error:
        raise app.UsageError(
            f"--signal_guidance={FLAGS.signal_guidance} is not like depth=2,flow=1.5"
        ) from error


def given(*names: str) -> dict[str, Any]:
    """The flags among `names` that were given."""
    return {name: value for name in names if (value := getattr(FLAGS, name)) is not None}


def from_flags(experiment: Experiment, words: tuple[str, ...] | None = None) -> Request:
    """A request from the command line; what is not given is as the model was trained."""
    said = given("sampler", "steps", "timesteps", "shift", "cache_threshold")
    if scale := guidance():
        if len(scale) > 1:
            raise app.UsageError("--guidance is one number for a model of vdx.main.")
        said["guidance"] = scale[0]
    if FLAGS.signal_guidance:
        said["signal_guidance"] = scales()
    frames, fps = experiment.clip_default()
    asked = given("image", "last_image", "reference", *STEER) | controls()
    return Request(
        words or prompts(),
        FLAGS.seed,
        FLAGS.num_frames or frames,
        FLAGS.fps or fps,
        {**dataclasses.asdict(experiment.sampling), **said},
        asked,
        {name: file_digest(name, path) for name, path in files(asked).items()},
    )


def one_file_or_folder(request: Request | PretrainedRequest) -> None:
    if len(request.prompts) > 1 and Path(FLAGS.out).suffix:
        raise app.UsageError(
            f"{len(request.prompts)} prompts need a folder: --out={Path(FLAGS.out).stem}"
        )


def same_weights(made: Weights | PretrainedWeights | None, identity: str, where: str) -> None:
    if made and made.identity != identity:
        raise app.UsageError(
            f"The weights in {where} are not those of the manifest; the clip "
            "cannot be made again from them."
        )


def draw_trained(manifest: dict | None) -> tuple[Request, Weights, Clips]:
    """With the weights of a run of vdx.main."""
    workdir = Path(FLAGS.workdir)
    experiment = load(workdir)
    request = fill(Request, manifest["request"], "manifest") if manifest else from_flags(experiment)
    one_file_or_folder(request)
    lookup(request.sampling["sampler"], SAMPLERS, "--sampler")
    controls = request.read_controls(experiment)  # says what is wrong before anything large is read
    mesh = experiment.mesh_spec.make()
    with jax.set_mesh(mesh):
        item, step = "ema" if FLAGS.averaged else "params", FLAGS.step
        if made := fill(Weights, manifest["weights"], "manifest.weights") if manifest else None:
            item, step = made.item, made.step
        params, step, identity = open_params(experiment, workdir, mesh, item=item, step=step)
        same_weights(made, identity, f"{workdir} at step {step}")
        if FLAGS.step_cache:
            calibration = read_calibration(workdir)
            check_calibration(
                calibration,
                identity,
                request.sampling,
                request.num_frames,
                request.fps,
                f"{workdir / PROOF}",
            )
            request = dataclasses.replace(
                request, sampling={**request.sampling, "cache_threshold": calibration.threshold}
            )
        videos = request.draw(experiment, params, controls)
    return request, Weights(str(workdir), step, item, identity), ([video] for video in videos)


def calibrate_run() -> None:
    """--calibrate_cache: what the run may reuse, and the proof, into its workdir."""
    workdir = Path(FLAGS.workdir)
    experiment = load(workdir)
    words = (
        prompts() if FLAGS.prompt or FLAGS.prompts_file else experiment.sample_prompts[:CALIBRATED]
    )
    asked, mesh = from_flags(experiment, words), experiment.mesh_spec.make()
    if asked.controls:
        raise app.UsageError(
            f"--calibrate_cache draws from words alone, not --{', --'.join(asked.controls)}."
        )
    sampling = fill(Sampling, {**asked.sampling, "cache_threshold": 0.0}, "sampling")
    with jax.set_mesh(mesh):
        params, _, identity = open_params(
            experiment, workdir, mesh, step=FLAGS.step, item="ema" if FLAGS.averaged else "params"
        )
        say = print if jax.process_index() == 0 else lambda line: None
        calibration = calibrate(
            experiment.generator(sampling),
            params,
            words,
            seed=FLAGS.seed,
            num_frames=asked.num_frames,
            fps=asked.fps,
            floor=FLAGS.calibrate_cache,
            weights=identity,
            say=say,
        )
    if jax.process_index() == 0:
        calibration.save(workdir)
        print(f"{calibration.said()}\nWrote {workdir / PROOF}; --step_cache uses it.")


def draw_public(manifest: dict | None) -> tuple[PretrainedRequest, PretrainedWeights, Clips]:
    """With public weights. What cannot be is said before anything large is read, and clips are
    decoded as they are asked for."""
    said = given(
        "negative_prompt",
        "image",
        "last_image",
        "control",
        "control_mask",
        "init_noise",
        "height",
        "width",
        "num_frames",
        "fps",
        "seed",
        "sampler",
        "timesteps",
        "steps",
        "shift",
        "cache_threshold",
        "dtype",
    )
    said |= {"guidance": guidance(), "mesh": mesh_spec()}
    said |= {
        name: tuple(files.split(","))
        for name, files in given("lora", "lora_2", "reference").items()
    }
    made = fill(PretrainedWeights, manifest["weights"], "manifest.weights") if manifest else None
    if not manifest:
        said["prompts"] = prompts()
    model, request, mesh = prepare(FLAGS.weights, said, manifest and manifest["request"])
    one_file_or_folder(request)
    identity = model.identity()
    same_weights(made, identity, FLAGS.weights)
    say = print if jax.process_index() == 0 else lambda line: None
    clips = PretrainedGenerator(model, request, mesh, say).clips(exact=bool(FLAGS.save_array))
    return request, PretrainedWeights(FLAGS.weights, identity), clips


def kept(clips: Clips, floats: list[np.ndarray]) -> Iterator[Iterable[np.ndarray]]:
    """The same clips; `floats` is filled with them."""
    for clip in clips:
        floats.append(np.concatenate(list(clip)))
        yield [floats[-1]]


def frames(clip: Iterable[np.ndarray], digest) -> Iterator[np.ndarray]:
    """uint8 [h w 3], which the digest reads as well."""
    for piece in clip:
        for frame in piece if piece.dtype == np.uint8 else to_uint8(piece):
            digest.update(frame.tobytes())
            yield frame


def write(
    request: Request | PretrainedRequest,
    clips: Clips,
    out: Path,
    weights: Weights | PretrainedWeights,
) -> None:
    """One prompt: out.mp4 and out.json. Several: a folder of clips and its manifest.json.

    Frames are written as they come, and no clip is held whole.
    """
    digest = hashlib.sha256()
    videos, rows = (frames(clip, digest) for clip in clips), None
    if len(request.prompts) == 1 and out.suffix:
        write_video(out, next(videos), request.fps)
        path = out.with_suffix(".json")
    else:
        rows = write_clips(
            out,
            videos,
            request.fps,
            [{"prompt": p, "seed": request.seed + i} for i, p in enumerate(request.prompts)],
        )
        path = out / "manifest.json"
    manifest = {
        "request": dataclasses.asdict(request),
        "weights": dataclasses.asdict(weights),
        "versions": {
            "vdx": vdx.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
        "pixels_sha256": digest.hexdigest(),
        **({"clips": rows} if rows else {}),
    }
    write_json(path, manifest)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}; options start with --.")
    enable_compilation_cache()
    # Also with a manifest: a stranger's could name any folder.
    if (FLAGS.workdir is None) == (FLAGS.weights is None):
        raise app.UsageError(
            "Give --workdir, the workdir of a run of vdx.main, or --weights, a "
            "folder of public weights."
        )
    if wrong := [name for name in (PUBLIC if FLAGS.workdir else TRAINED) if FLAGS[name].present]:
        raise app.UsageError(
            f"--{', --'.join(wrong)}: not with --{'workdir' if FLAGS.workdir else 'weights'}."
        )
    if FLAGS.from_manifest and FLAGS.step_cache:
        raise app.UsageError("--step_cache: a manifest says itself what was reused.")
    manifest = read_json(FLAGS.from_manifest) if FLAGS.from_manifest else None
    if manifest and not {"request", "weights"} <= set(manifest):
        raise app.UsageError(f"{FLAGS.from_manifest} is not a manifest of vdx.sample.")
    try:
        if FLAGS.calibrate_cache is not None:
            return calibrate_run()
        request, weights, clips = (draw_trained if FLAGS.workdir else draw_public)(manifest)
        floats: list[np.ndarray] = []
        if FLAGS.save_array:
            clips = kept(clips, floats)
        if jax.process_index() == 0:
            write(request, clips, Path(FLAGS.out), weights)
        else:  # decoding takes all processes
            for clip in clips:
                collections.deque(clip, maxlen=0)
    except (ConfigError, WeightsError, CheckpointError) as error:
        sys.exit(f"vdx.sample: {error}")
    if jax.process_index() == 0:
        if FLAGS.save_array:
            np.save(FLAGS.save_array, np.stack(floats))
        print(f"Wrote {FLAGS.out}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The workdir of a run of vdx.main.")
    flags.DEFINE_string(
        "weights", None, "A folder of public weights: of diffusers, or written by vdx.convert."
    )
    flags.DEFINE_string("prompt", None, "What to show.")
    flags.DEFINE_string("prompts_file", None, "A text file, one prompt a line.")
    flags.DEFINE_string("from_manifest", None, "Make the clips of this manifest again.")
    flags.DEFINE_string("step", None, 'A step, or "best"; default: the newest that verifies.')
    flags.DEFINE_bool("averaged", True, "The averaged weights, or those of the step itself.")
    flags.DEFINE_string("out", "out.mp4", "An mp4, or a folder for several prompts.")
    flags.DEFINE_string("save_array", None, "Also save float32 [n t h w c] in [-1, 1] as .npy.")
    flags.DEFINE_integer("seed", 0, "Clip i takes seed + i.")
    flags.DEFINE_string("sampler", None, f"One of {', '.join(SAMPLERS)}.")
    flags.DEFINE_string(
        "timesteps",
        None,
        f"Where the sampler stops: one of {', '.join(TIMESTEPS)}. Of "
        "--weights the default is what the folder's scheduler means: UniPC "
        "diffusers_unipc, FlowMatchEuler diffusers_euler, DPMSolver "
        "diffusers_dpmpp.",
    )
    flags.DEFINE_integer("steps", None, "Sampler steps.", lower_bound=1)
    flags.DEFINE_float("shift", None, "Time shift of the grid: above 1, more steps at high noise.")
    flags.DEFINE_float(
        "cache_threshold",
        None,
        "The network is not asked while its answer would change by "
        "less than this share; 0 is exact.",
        lower_bound=0.0,
    )
    flags.DEFINE_float(
        "calibrate_cache",
        None,
        "Instead of drawing: find the largest --cache_threshold whose "
        "clips have at least this SSIM to the exact ones, for --prompt, "
        "--prompts_file or the first prompts of the run's wall, and keep it with "
        f"its proof in the workdir ({PROOF}).",
    )
    flags.DEFINE_bool("step_cache", False, "Reuse as much as was calibrated.")
    flags.DEFINE_string(
        "guidance",
        None,
        "Scale of classifier-free guidance; 1 is none. Two "
        "numbers, as in 4,3: of the experts for high and for low noise.",
    )
    flags.DEFINE_integer("num_frames", None, "Frames of the clip.", lower_bound=1)
    flags.DEFINE_float(
        "fps", None, "Frames per second, also told to a trained model.", lower_bound=0.1
    )
    flags.DEFINE_string("negative_prompt", None, "What guidance leads away from; default: empty.")
    flags.DEFINE_string("image", None, "A picture that the clip begins with.")
    flags.DEFINE_string("last_image", None, "A picture that it ends with.")
    flags.DEFINE_string(
        "reference",
        None,
        "A picture of what is to be seen; of --weights (VACE) "
        "also several, with commas between them.",
    )
    flags.DEFINE_string(
        "control",
        None,
        "What leads every frame. Of --workdir depth=FILE or "
        "pose=FILE, a .npy or a video as vdx.data.track_files says; of --weights "
        "(VACE) a video: depth, pose, footage to be changed, of which the frames "
        "nearest in time at --fps are read.",
    )
    flags.DEFINE_string(
        "control_mask",
        None,
        "A video or a picture, white where the control is drawn anew; default: all of it.",
    )
    flags.DEFINE_string("flow", None, "A .npy file [t h w 2]: pixels to the next frame.")
    flags.DEFINE_string("camera", None, "A .json file of cameras, as vdx.data.camera says.")
    flags.DEFINE_string(
        "actions", None, "One for each frame, with commas between them, or a .json file."
    )
    flags.DEFINE_float(
        "motion", None, "Strength of motion, as vdx.data.motion measures it.", lower_bound=0.0
    )
    flags.DEFINE_string(
        "signal_guidance",
        None,
        "Guidance scales of other signals than the text, such as depth=2,flow=1.5",
    )
    flags.DEFINE_string(
        "init_noise",
        None,
        "A .npy file, float32 [b t h w c] of latents, to "
        "start from instead of noise from the seeds.",
    )
    flags.DEFINE_string(
        "lora",
        None,
        "LoRA files with their weights, such as style.safetensors:0.8,other.safetensors",
    )
    flags.DEFINE_string("lora_2", None, "The same for the second of two experts.")
    flags.DEFINE_integer("height", None, "Pixels.", lower_bound=1)
    flags.DEFINE_integer("width", None, "Pixels.", lower_bound=1)
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "Of the text encoder and the transformer; default: float32 on a CPU, else bfloat16.",
    )
    flags.DEFINE_string(
        "mesh",
        None,
        "Devices along each axis, such as fsdp=4,tensor=2; default: "
        "tensor as far as it divides the heads, the rest fsdp.",
    )
    logging.set_verbosity(logging.WARNING)
    app.run(main)
