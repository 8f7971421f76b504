"""Checks of a request to a pretrained model, before anything large is read.

Each check is a function that returns a message, or None if nothing is wrong.
"""

from collections.abc import Callable

from jax.sharding import Mesh

from vdx.config.build import ConfigError
from vdx.generate.image_inputs import count_frames, open_image
from vdx.generate.pretrained_request import PretrainedRequest, size_unit, start_noise
from vdx.interop.lora import open_lora
from vdx.interop.pretrained import EXPERTS, PretrainedModel

Check = Callable[[PretrainedRequest, PretrainedModel, Mesh], str | None]


def check(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> None:
    """Raise ConfigError that lists everything that the model cannot draw of a request."""
    messages = [one(request, model, mesh) for one in CHECKS]
    problems = [message for message in messages if message]
    if problems:
        raise ConfigError("\n  ".join([f"{model.path} cannot draw this:", *problems]))
    request.check_files()
    _open_loras(request, model)
    _open_controls(request, model)
    start_noise(request, model)


def num_frames(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> str | None:
    """Check that the frames are whole latent frames."""
    rate = model.components["vae"].module.rates[0]
    count = request.num_frames
    if count >= 1 and (count - 1) % rate == 0:
        return None
    low = 1 + max(0, (count - 1) // rate) * rate
    return f"num_frames = {count} is not 1 + {rate}n: take {low} or {low + rate}"


def height(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> str | None:
    """Check that the height is a number of whole tokens."""
    return _side("height", request.height, size_unit(model))


def width(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> str | None:
    """Check that the width is a number of whole tokens."""
    return _side("width", request.width, size_unit(model))


def _side(name: str, size: int, unit: int) -> str | None:
    if size >= unit and size % unit == 0:
        return None
    low = max(1, size // unit) * unit
    high = (size // unit + 1) * unit
    return f"{name} = {size} is not a multiple of {unit}: take {low} or {high}"


def image_is_read(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> str | None:
    """Check that an image is given to a model that reads one."""
    image = request.controls.get("image")
    if not image or model.reads_images:
        return None
    inputs = "a control and references" if model.reads_control else "text alone"
    return f"image = {image}: this model reads {inputs}"


def control_is_read(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> str | None:
    """Check that a control is given to a model with control blocks."""
    given = {"control", "control_mask", "reference"} & request.controls.keys()
    if not given or model.reads_control:
        return None
    return "this model has no control blocks (VACE) that read a control, its mask or a reference"


def mask_has_control(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> str | None:
    """Check that a mask comes with the control that it masks."""
    if "control_mask" in request.controls and "control" not in request.controls:
        return "a control_mask needs a control"
    return None


def image_is_given(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> str | None:
    """Check that a model that begins with an image has one."""
    if "concat" in model.signals and "image" not in request.controls:
        return "this model begins with an image: give an image"
    return None


def last_image_has_image(
    request: PretrainedRequest, model: PretrainedModel, mesh: Mesh
) -> str | None:
    """Check that a last image comes with a first one."""
    if "last_image" in request.controls and "image" not in request.controls:
        return "a last_image needs an image"
    return None


def last_image_is_read(
    request: PretrainedRequest, model: PretrainedModel, mesh: Mesh
) -> str | None:
    """Check that a last image is given to a model that reads two images."""
    last_image = request.controls.get("last_image")
    if not last_image or not model.reads_images:
        return None
    first_token_alone = "image_tokens" in model.signals and not _reads_two_tokens(model)
    if model.clamps_first_frame or first_token_alone:
        return f"last_image = {last_image}: this model reads a first one alone"
    return None


def last_image_is_given(
    request: PretrainedRequest, model: PretrainedModel, mesh: Mesh
) -> str | None:
    """Check that a model of first and last frames has a last one."""
    if _reads_two_tokens(model) and "last_image" not in request.controls:
        return "this model also ends with an image: give a last_image"
    return None


def _reads_two_tokens(model: PretrainedModel) -> bool:
    """Return whether image tokens have positions: two images differ (FLF2V)."""
    return bool(model.signals.get("image_tokens", {}).get("positions"))


def last_image_has_room(
    request: PretrainedRequest, model: PretrainedModel, mesh: Mesh
) -> str | None:
    """Check that the first and the last frame are not the same latent frame."""
    if "last_image" in request.controls and request.latent_shape(model)[0] < 2:
        rate = model.components["vae"].module.rates[0]
        return f"a last_image needs num_frames of at least {1 + rate}"
    return None


def guidance(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> str | None:
    """Check that there is one scale, or one for each expert."""
    experts = len(model.experts)
    if len(request.guidance) in (1, experts):
        return None
    return f"guidance = {request.guidance}: this model has {experts} transformer(s)"


def second_lora(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> str | None:
    """Check that adapters of a second expert have one."""
    if request.lora_2 and len(model.experts) < 2:
        return "lora_2 needs a model with two experts"
    return None


def context_axis(request: PretrainedRequest, model: PretrainedModel, mesh: Mesh) -> str | None:
    """Check that the latent frames divide over the mesh axis context."""
    frames = request.latent_shape(model)[0]
    devices = mesh.shape["context"]
    if frames % devices == 0:
        return None
    references = " and the references'" if request.references else ""
    return (
        f"{request.num_frames} frames{references} are {frames} latent ones, which do not divide "
        f"over the mesh axis context = {devices}"
    )


CHECKS: tuple[Check, ...] = (
    num_frames,
    height,
    width,
    image_is_read,
    control_is_read,
    mask_has_control,
    image_is_given,
    last_image_has_image,
    last_image_is_read,
    last_image_is_given,
    last_image_has_room,
    guidance,
    second_lora,
    context_axis,
)


def _open_loras(request: PretrainedRequest, model: PretrainedModel) -> None:
    """Raise WeightsError for LoRA files that are not of the model."""
    for number, expert in enumerate(model.experts):
        for path, _ in request.adapters(number):
            open_lora(path, expert.module, EXPERTS[number])


def _open_controls(request: PretrainedRequest, model: PretrainedModel) -> None:
    """Raise ConfigError for images and videos that cannot be read or are too short."""
    rate = model.components["vae"].module.rates[0]
    sizes = {}
    for name, path in request.input_files().items():
        kind = name.split()[0]  # "reference 0" -> "reference"
        if kind in ("image", "last_image", "reference"):
            sizes[kind] = open_image(kind, path).size
        elif kind in ("control", "control_mask"):
            length = count_frames(kind, path, request.fps, request.num_frames)
            if length < request.num_frames:
                raise ConfigError(
                    f"--{kind}={path} shows {length} frames at fps = {request.fps}; "
                    f"num_frames = {request.num_frames} is more: take "
                    f"{1 + (length - 1) // rate * rate}."
                )

    first = sizes.get("image")
    last = sizes.get("last_image", first)
    if request.preprocess == "official" and first != last:
        raise ConfigError(
            f"--image is {first} and --last_image {last} (width, height): the makers' preparation "
            "is meant for two images of one size. Crop them, or give --preprocess=diffusers."
        )
