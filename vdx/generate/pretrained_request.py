"""Requests to pretrained models: their fields, their defaults, and their latents."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vdx.config.build import ConfigError, fill
from vdx.config.ranges import ComputeType, Count, Finite
from vdx.diffusion.timesteps import TIMESTEPS
from vdx.files import read_npy
from vdx.generate.generator import Sampling
from vdx.generate.image_inputs import count_frames, iter_frames
from vdx.generate.manifest import manifest_request
from vdx.generate.preprocess import CHOICES, preprocess_for
from vdx.generate.request import Request, check_prompt, check_settings
from vdx.interop.family_defaults import default_settings, family_defaults
from vdx.interop.pretrained import PretrainedModel
from vdx.seeds import seed_key

SAMPLING = ("sampler", "timesteps", "steps", "shift", "cache_threshold")
CONTROLS = ("image", "last_image", "control", "control_mask", "reference")
LORAS = ("lora", "lora_2")
MAKERS_PROMPT = "default"  # as a negative prompt: that of the model's family
FIXED = ("prompts", "dtype", "mesh")  # fields that are no settings of a call


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedRequest(Request):
    """A request to a pretrained model.

    Its `sampling` has the fields named in SAMPLING. Its `controls` are paths:

    - image, last_image: images that the clip begins and ends with.
    - control: a video that leads every frame (VACE).
    - control_mask: a video or an image, white where the control is drawn anew, black where it
      stays; without it all of the control is drawn anew.
    - reference: a list of images of the subject (VACE).
    """

    height: Count  # pixels
    width: Count  # pixels
    guidance: tuple[Finite, ...]  # one scale, or one for each expert; 1 is none
    dtype: ComputeType  # of the computation; decides the last bits
    mesh: dict[str, int]  # devices along each axis; decides the last bits
    negative_prompt: str = ""  # guidance leads away from it
    preprocess: str = "diffusers"  # how images are prepared: one of CHOICES of preprocess.py
    init_noise: str | None = None  # a .npy file, float32 [b t h w c]; None: noise of the seeds
    lora: tuple[str, ...] = ()  # LoRA files of the transformer, each with its weight: "a:0.8"
    lora_2: tuple[str, ...] = ()  # of the second expert

    def __post_init__(self) -> None:
        """Raise ConfigError for a prompt that no text encoder can read."""
        super().__post_init__()
        check_prompt("The negative prompt", self.negative_prompt)

    @property
    def references(self) -> list[str]:
        """Paths of the reference images."""
        return self.controls.get("reference", [])

    def expert_sampling(self, expert: int) -> Sampling:
        """Return the sampling of one expert."""
        guidance = self.guidance[expert % len(self.guidance)]
        return Sampling(**self.sampling, guidance=guidance, batch=1)

    def adapters(self, expert: int) -> list[tuple[str, float]]:
        """Return (LoRA file, weight) of each adapter of an expert."""
        return [parse_weight(text) for text in getattr(self, LORAS[expert])]

    def input_files(self) -> dict[str, str]:
        """Return {name: path} of the files that the request reads."""
        files = super().input_files()
        if self.init_noise:
            files["init_noise"] = self.init_noise
        for name in LORAS:
            for i, text in enumerate(getattr(self, name)):
                files[f"{name} {i}"] = parse_weight(text)[0]
        return files

    def network_time(self, t: np.ndarray) -> np.ndarray:
        """Return the times that the network reads at times t of the process."""
        row = TIMESTEPS[self.sampling["timesteps"]]
        return row(self.sampling["steps"], self.sampling["shift"]).network_time(t)

    def latent_shape(self, model: PretrainedModel) -> tuple[int, int, int, int]:
        """Return (t, h, w, c) of the latents of a clip, those of its references before it."""
        vae = model.components["vae"].module
        frames, side = vae.rates
        return (
            len(self.references) + (self.num_frames - 1) // frames + 1,
            self.height // side,
            self.width // side,
            vae.z_dim,
        )


FIELDS = tuple(field.name for field in dataclasses.fields(PretrainedRequest))
SETTINGS = {*FIELDS, *SAMPLING, *CONTROLS} - {"sampling", "controls", "digests", *FIXED}


def parse_weight(text: str) -> tuple[str, float]:
    """Split "a:0.8" into ("a", 0.8); without a weight it is 1."""
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:  # a colon of the path
        return text, 1.0


def default_dtype() -> str:
    """Return bfloat16 for accelerators, float32 for a CPU."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def default_mesh(model: PretrainedModel) -> dict[str, int]:
    """Return a mesh for one clip at a time.

    As many devices as the heads allow share the work on a clip (tensor). The others share the
    weights and the clips (fsdp).
    """
    heads = [expert.module.backbone_config["heads"] for expert in model.experts]
    encoder = model.components["text_encoder"].module
    tensor = math.gcd(jax.device_count(), encoder.heads, *heads)
    return {"data": 1, "fsdp": -1, "tensor": tensor}


def complete(model: PretrainedModel, settings: Mapping[str, Any]) -> PretrainedRequest:
    """Return a request; what is missing has the defaults of folder and family.

    settings: names of SETTINGS; None counts as missing. Without a size the frame has the
    proportions of the image or the control, and the default area. Without num_frames there are
    at most as many frames as the control has. Raises ConfigError for unknown settings and files
    that cannot be read, WeightsError for a scheduler that vdx does not have.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    check_settings(given, SETTINGS, "A pretrained model", ignore=FIXED)

    _check_preprocess(given)

    # Defaults of family and folder, then of the input files; then what is given.
    fields = default_settings(model, given) | {"seed": 0, "dtype": model.dtype}
    fields |= _default_size(model, given, fields)
    fields |= _default_length(model, given, fields)
    fields |= given
    if fields["negative_prompt"] == MAKERS_PROMPT:
        fields["negative_prompt"] = family_defaults(model).negative_prompt

    # The sections of a request.
    for name in ("guidance", "reference", *LORAS):
        if isinstance(fields.get(name), int | float | str):
            fields[name] = (fields[name],)  # one value stands for a sequence of one
    controls = {name: fields.pop(name) for name in CONTROLS if fields.get(name)}
    if "reference" in controls:
        controls["reference"] = list(controls["reference"])
    sampling = {name: fields.pop(name) for name in SAMPLING if name in fields}

    request = fill(
        PretrainedRequest,
        {**fields, "controls": controls, "sampling": _checked_sampling(sampling)},
        "request",
    )
    return request.with_digests()


def _check_preprocess(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for an unknown preparation of images, or one without an image."""
    name = given.get("preprocess")
    if name is None:
        return
    if name not in CHOICES:
        raise ConfigError(f"preprocess = {name!r}: expected one of {', '.join(CHOICES)}.")
    if "image" not in given:
        raise ConfigError(
            f"preprocess = {name}: it prepares the first image of a clip, and none is given."
        )


def _checked_sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields named in SAMPLING, converted and checked. Raises ConfigError."""
    sampling = fill(Sampling, fields, "sampling")
    if not sampling.timesteps:
        raise ConfigError(f"timesteps: expected one of {', '.join(TIMESTEPS)}.")
    TIMESTEPS[sampling.timesteps](sampling.steps, sampling.shift)  # checks shift
    return {name: getattr(sampling, name) for name in SAMPLING}


def _default_size(
    model: PretrainedModel, given: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, int]:
    """Return height and width in the proportions of the image or control, if any."""
    source = next((name for name in ("image", "control") if name in given), None)
    if source is None or {"height", "width"} & given.keys():
        return {}
    first = next(iter_frames(source, given[source], 1.0))
    area = fields["height"] * fields["width"]
    name = given.get("preprocess", fields["preprocess"])
    preprocess = preprocess_for(name, model.clamps_first_frame)
    return preprocess.frame_size(area, size_unit(model), *first.size)._asdict()


def _default_length(
    model: PretrainedModel, given: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, int]:
    """Return num_frames of a control: 1 + a multiple of the frames of a latent frame."""
    if "control" not in given or "num_frames" in given:
        return {}
    fps = given.get("fps") or fields["fps"]
    length = count_frames("control", given["control"], fps, fields["num_frames"])
    rate = model.components["vae"].module.rates[0]
    return {"num_frames": 1 + (length - 1) // rate * rate}


def size_unit(model: PretrainedModel) -> int:
    """Return the number of pixels of which heights and widths are multiples."""
    patch = model.experts[0].module.backbone_config["patch"]
    return model.components["vae"].module.rates[1] * max(patch[1:])


def remake(fields: Mapping[str, Any], moved: Mapping[str, Any]) -> PretrainedRequest:
    """Return the request of a manifest.

    moved: new paths of its files, and a new mesh.
    Raises ConfigError for a file that the request does not read.
    """
    request = manifest_request({"request": fields}, PretrainedRequest)
    moved = {name: value for name, value in moved.items() if value is not None}
    mesh = moved.pop("mesh", request.mesh)
    if "reference" in moved:
        moved["reference"] = list(moved["reference"])
    sampling = _checked_sampling(request.sampling)
    return dataclasses.replace(request.relocated(moved), mesh=mesh, sampling=sampling)


def start_noise(request: PretrainedRequest, model: PretrainedModel) -> np.ndarray:
    """Return noise float32 [n t h w c].

    Raises ConfigError for init_noise of another shape or type.
    """
    shape = request.latent_shape(model)
    if request.init_noise is None:
        keys = [seed_key(seed) for seed in request.seeds]
        return np.stack([jax.random.normal(key, shape) for key in keys])
    try:
        noise = read_npy(request.init_noise)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"init_noise = {request.init_noise} is not a .npy file: {error}."
        ) from error
    expected = (len(request.prompts), *shape)
    if noise.shape != expected or noise.dtype != np.float32:
        raise ConfigError(
            f"init_noise = {request.init_noise} is {noise.dtype} {noise.shape}; this "
            f"needs float32 {expected} [b t h w c]."
        )
    return np.asarray(noise)
