"""What clips to draw with public weights: the request, its defaults, and what cannot be asked."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vdx.config.build import ConfigError, fill, lookup
from vdx.diffusion.samplers import SAMPLERS
from vdx.diffusion.timesteps import TIMESTEPS
from vdx.generate.control_inputs import file_digest
from vdx.generate.image_inputs import iter_frames, open_picture
from vdx.generate.pipeline import Sampling
from vdx.interop.lora import open_lora
from vdx.interop.pretrained import EXPERTS, PretrainedModel, open_pretrained
from vdx.parallel import MeshSpec

FILES = ("image", "last_image", "control", "control_mask", "init_noise")
LORAS = ("lora", "lora_2")


@dataclasses.dataclass(frozen=True)
class PretrainedRequest:
    """All that decides the clips, besides the weights.

    image, last_image: files of pictures that the clip begins and ends with. control: a video
    that leads the clip (VACE). control_mask: a video or a picture, white where it is drawn anew,
    black where it stays; all of it is drawn anew without. reference: pictures of what is to be
    seen. init_noise: a .npy file, float32 [b t h w c], to start from instead of noise from the
    seeds (clip i: seed + i).
    lora, lora_2: LoRA files of the transformer, and of the second expert, each with its weight
    ("style.safetensors:0.8"; 1 unless given). digests: SHA-256 of these files. guidance: one
    scale, or one for each expert; 1 is none. negative_prompt: what guidance leads away from;
    empty, as in diffusers. reuse: see Sampling. dtype, mesh: of the computation; they decide the
    last bits.
    """

    prompts: tuple[str, ...]
    seed: int
    num_frames: int
    fps: float
    height: int
    width: int
    sampler: str
    timesteps: str
    steps: int
    shift: float
    guidance: tuple[float, ...]
    dtype: str
    mesh: dict
    negative_prompt: str = ""
    image: str | None = None
    last_image: str | None = None
    control: str | None = None
    control_mask: str | None = None
    reference: tuple[str, ...] = ()
    init_noise: str | None = None
    lora: tuple[str, ...] = ()
    lora_2: tuple[str, ...] = ()
    cache_threshold: float = 0.0
    digests: dict = dataclasses.field(default_factory=dict)

    def sampling(self, expert: int = 0) -> Sampling:
        return Sampling(
            sampler=self.sampler,
            timesteps=self.timesteps,
            steps=self.steps,
            shift=self.shift,
            guidance=self.guidance[expert % len(self.guidance)],
            batch=1,
            cache_threshold=self.cache_threshold,
        )

    def adapters(self, expert: int) -> list[tuple[str, float]]:
        """(LoRA file, weight) of those of an expert."""
        return [weighted(text) for text in (self.lora, self.lora_2)[expert]]

    def files(self) -> dict[str, str]:
        """{name: path} of the files that it reads."""
        out = {name: path for name in FILES if (path := getattr(self, name))}
        out |= {f"reference {i}": path for i, path in enumerate(self.reference)}
        return out | {
            f"{name} {i}": weighted(text)[0]
            for name in LORAS
            for i, text in enumerate(getattr(self, name))
        }

    def network_time(self, t: np.ndarray) -> np.ndarray:
        """What the network is fed at times of the grid."""
        return TIMESTEPS[self.timesteps](self.steps, self.shift).network_time(t)

    def latents(self, model: PretrainedModel) -> tuple[int, int, int, int]:
        """(t, h, w, c) of a clip's latents; those of the references are before it."""
        vae = model.components["vae"].module
        frames, side = vae.rates
        return (
            len(self.reference) + (self.num_frames - 1) // frames + 1,
            self.height // side,
            self.width // side,
            vae.z_dim,
        )


def weighted(text: str) -> tuple[str, float]:
    """("a:0.8") -> ("a", 0.8); without a weight it is 1."""
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:  # a colon of the path
        return text, 1.0


def recommended(model: PretrainedModel) -> dict[str, Any]:
    """What those who released the model draw it with, as far as the folder does not say it."""
    wan: dict[str, Any] = {
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "fps": 16.0,
        "steps": 50,
        "guidance": (5.0,),
    }
    if model.clamps_first_frame:
        wan |= {"height": 704, "width": 1280, "num_frames": 121, "fps": 24.0}
    elif model.boundary:
        wan |= {"steps": 40, "guidance": (3.5, 3.5) if model.reads_images else (4.0, 3.0)}
    elif model.reads_images and not model.signals.get("image_tokens", {}).get("positions"):
        wan |= {"steps": 40}
    return wan


def default_dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def default_mesh(model: PretrainedModel) -> dict[str, int]:
    """As many devices as heads allow share the work on one clip (tensor), the others hold shares
    of the weights and of the clips (fsdp)."""
    heads = [e.module.backbone_config["heads"] for e in model.experts]
    encoder = model.components["text_encoder"].module
    tensor = math.gcd(jax.device_count(), encoder.heads, *heads)
    return {"data": 1, "fsdp": -1, "tensor": tensor}


def complete(model: PretrainedModel, given: Mapping[str, Any]) -> PretrainedRequest:
    """A request from what was `given`; the rest is from the model's folder, or recommended.

    Without a size the frame has the proportions of the image or the control, and the recommended
    area; without a number of frames there are at most as many as the control shows. Raises
    ConfigError for files that cannot be read, WeightsError for a scheduler that is not known.
    """
    given = {k: v for k, v in given.items() if v is not None}
    fields = recommended(model) | {"seed": 0, "dtype": model.dtype}
    if not {"sampler", "timesteps", "shift"} <= given.keys():
        fields |= model.schedule()._asdict()
    shown = next((name for name in ("image", "control") if name in given), None)
    if shown and not {"height", "width"} & given.keys():
        first = next(iter_frames(shown, given[shown], 1.0))
        fields["height"], fields["width"] = shape_for(
            fields["height"] * fields["width"], _unit(model), *first.size
        )
    if "control" in given and "num_frames" not in given:
        length = _length(
            "control", given["control"], given.get("fps") or fields["fps"], fields["num_frames"]
        )
        rate = model.components["vae"].module.rates[0]
        fields["num_frames"] = 1 + (length - 1) // rate * rate
    request = fill(PretrainedRequest, fields | given, "request")
    return dataclasses.replace(
        request, digests={name: file_digest(name, path) for name, path in request.files().items()}
    )


def prepare(
    folder: str, given: Mapping[str, Any], made: Mapping[str, Any] | None = None
) -> tuple[PretrainedModel, PretrainedRequest, Mesh]:
    """(model, request, mesh), checked in all that can be without reading anything large.

    given: what the command line says. made: the request of a manifest, of which it can replace
    where files lie and the mesh. Raises ConfigError and WeightsError.
    """
    if made is not None:
        request = remake(made, given)
        model = open_pretrained(folder, request.dtype)
    else:
        model = open_pretrained(folder, given.get("dtype") or default_dtype())
        request = complete(model, {**given, "mesh": given.get("mesh") or default_mesh(model)})
    mesh = fill(MeshSpec, request.mesh, "mesh").make()
    check(request, model, mesh)
    model.check(mesh)
    return model, request, mesh


def remake(fields: Mapping[str, Any], given: Mapping[str, Any]) -> PretrainedRequest:
    """The request of a manifest; files and the mesh may lie elsewhere now."""
    request = fill(PretrainedRequest, fields, "manifest.request")
    moved = {
        k: v
        for k, v in given.items()
        if v is not None and k in (*FILES, *LORAS, "reference", "mesh")
    }
    if new := [k for k in moved if k != "mesh" and not getattr(request, k)]:
        raise ConfigError(f"The manifest's clip has no {', '.join(new)}.")
    return dataclasses.replace(request, **moved)


def shape_for(area: int, unit: int, width: int, height: int) -> tuple[int, int]:
    """(height, width): multiples of `unit` with about the proportions of a picture and at most
    about `area` pixels, as the Wan of pictures has it."""
    tall, wide = math.sqrt(area * height / width), math.sqrt(area * width / height)
    return max(1, round(tall) // unit) * unit, max(1, round(wide) // unit) * unit


def _length(name: str, path: str, fps: float, most: int) -> int:
    """How many frames a file shows at this rate, of so many."""
    return sum(1 for _ in itertools.islice(iter_frames(name, path, fps), most))


def _unit(model: PretrainedModel) -> int:
    """Heights and widths are multiples of this."""
    return model.components["vae"].module.rates[1] * max(
        model.experts[0].module.backbone_config["patch"][1:]
    )


def check(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> None:
    """Raises ConfigError that lists all that the request asks and the model cannot do."""
    frames, unit = model.components["vae"].module.rates[0], _unit(model)
    low = 1 + max(0, (request.num_frames - 1) // frames) * frames
    positions = model.signals.get("image_tokens", {}).get("positions")
    t = request.latents(model)[0]
    problems = [
        message
        for wrong, message in (
            (
                request.num_frames < 1 or (request.num_frames - 1) % frames,
                f"num_frames = {request.num_frames} is not 1 + {frames}n: take {low} or {low + frames}",
            ),
            *(
                (
                    size < unit or size % unit,
                    f"{name} = {size} is not a multiple of {unit}: take {max(1, size // unit) * unit} or "
                    f"{(size // unit + 1) * unit}",
                )
                for name, size in (("height", request.height), ("width", request.width))
            ),
            (
                request.image and not model.reads_images,
                f"image = {request.image}: this model reads "
                + ("a control and references" if model.reads_control else "text alone"),
            ),
            (
                (request.control or request.control_mask or request.reference)
                and not model.reads_control,
                "this model has no control blocks (VACE) that read a control, its mask or a reference",
            ),
            (request.control_mask and not request.control, "a control_mask needs a control"),
            (
                not request.image and "concat" in model.signals,
                "this model begins with a picture: give an image",
            ),
            (request.last_image and not request.image, "a last_image needs an image"),
            (
                request.last_image
                and model.reads_images
                and (
                    model.clamps_first_frame or ("image_tokens" in model.signals and not positions)
                ),
                f"last_image = {request.last_image}: this model reads a first one alone",
            ),
            (
                positions and not request.last_image,
                "this model also ends with a picture: give a last_image",
            ),
            (
                request.last_image and t < 2,
                f"a last_image needs num_frames of at least {1 + frames}",
            ),
            (
                len(request.guidance) not in (1, len(model.experts)),
                f"guidance = {request.guidance}: this model has {len(model.experts)} transformer(s)",
            ),
            (request.lora_2 and len(model.experts) < 2, "lora_2 needs a model with two experts"),
            (
                t % mesh.shape["context"],
                f"{request.num_frames} frames{' and the references' * bool(request.reference)} are {t} "
                f"latent ones, which do not divide over the mesh axis context = "
                f"{mesh.shape['context']}",
            ),
        )
        if wrong
    ]
    if problems:
        raise ConfigError("\n  ".join([f"{model.path} cannot draw this:", *problems]))
    lookup(request.sampler, SAMPLERS, "sampler")
    lookup(request.timesteps, TIMESTEPS, "timesteps")(request.steps, request.shift)
    for name, path in request.files().items():
        if file_digest(name, path) != request.digests.get(name):
            raise ConfigError(
                f"{name} = {path} is not the file of the request; give the right "
                f"one by --{name.split()[0]}."
            )
    for number, expert in enumerate(model.experts):
        for path, _ in request.adapters(number):
            open_lora(path, expert.module, EXPERTS[number])
    for name, path in request.files().items():
        if (kind := name.split()[0]) in ("image", "last_image", "reference"):
            open_picture(kind, path)
        elif kind in ("control", "control_mask"):
            length = _length(kind, path, request.fps, request.num_frames)
            if length < request.num_frames:
                raise ConfigError(
                    f"--{kind}={path} shows {length} frames at fps = {request.fps}; "
                    f"num_frames = {request.num_frames} is more: take "
                    f"{1 + (length - 1) // frames * frames}."
                )
    start_noise(request, model)


def start_noise(request: PretrainedRequest, model: PretrainedModel) -> np.ndarray:
    """Noise float32 [n t h w c]. Raises ConfigError for init_noise of another shape or type."""
    shape, count = request.latents(model), len(request.prompts)
    if request.init_noise is None:
        return np.stack(
            [jax.random.normal(jax.random.key(request.seed + i), shape) for i in range(count)]
        )
    try:
        noise = np.load(request.init_noise, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"init_noise = {request.init_noise} is not a .npy file: {error}."
        ) from error
    if noise.shape != (count, *shape) or noise.dtype != np.float32:
        raise ConfigError(
            f"init_noise = {request.init_noise} is {noise.dtype} {noise.shape}; this "
            f"needs float32 {(count, *shape)} [b t h w c]."
        )
    return np.asarray(noise)
