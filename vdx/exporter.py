"""From the checkpoint of a run to files of other programs, and clips of them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from vdx.config.build import ConfigError
from vdx.data.pipeline import DataError
from vdx.experiment import Experiment
from vdx.generate.clip import write_stream
from vdx.generate.pretrained_pipeline import PretrainedPipeline
from vdx.generate.pretrained_request import PretrainedRequest
from vdx.interop.keymap import WeightsError
from vdx.interop.lora import factor_rows, write_lora
from vdx.interop.save import empty_folder, export_plan, save_folder
from vdx.interop.wan_config import wan_config
from vdx.interop.wan_keys import wan_transformer_rows
from vdx.load_pipeline import latent_examples
from vdx.model_card import DataSummary, Places, file_metadata
from vdx.models.adapters.trainable import Trainable
from vdx.output_paths import check_output_file, check_output_folder
from vdx.parallel import MeshSpec
from vdx.types import Params
from vdx.weights import open_trained

__all__ = [
    "check_export",
    "draw_clips",
    "output_places",
    "sample_request",
    "write_weights",
]


def output_places(experiment: Experiment, out: Path) -> Places:
    """Return where an export is written.

    Raises ConfigError for a place that cannot be written, WeightsError for a folder with files.
    """
    if experiment.lora is None:
        check_output_folder(out, "out")
        empty_folder(out)
        return Places(out, out / "README.md", out / "clips")
    places = Places(out, out.with_suffix(".md"), out.with_name(f"{out.stem}_clips"))
    check_output_file(places.weights, "out", (".safetensors",))
    check_output_file(places.card, "out", (".md",))
    check_output_folder(places.clips, "out")
    return places


def check_export(experiment: Experiment, layout: str, draws: bool) -> None:
    """Raise ConfigError for a run that other programs have no layout for.

    draws: there are prompts of sample clips.
    """
    if isinstance(experiment.trained_part, Trainable):
        raise ConfigError(
            "This run trained a part of its network (config.trainable), for which there is no file "
            "of other programs. Draw with it by python -m vdx.sample --workdir=..., or start "
            "another run from it by config.init."
        )
    if experiment.model.backbone_config["name"] != "transformer":
        raise ConfigError(_no_layout("its backbone is no transformer"))

    # The rows name every parameter, or adapter, that the run has.
    try:
        if experiment.lora is None:
            export_plan(experiment.shapes, wan_transformer_rows(experiment.model))
        else:
            export_plan(experiment.weights.new_shapes(), factor_rows(experiment.model))
    except (WeightsError, ConfigError) as error:
        raise ConfigError(_no_layout(str(error).splitlines()[0])) from error

    if experiment.lora is None and layout != "diffusers":
        raise ConfigError(
            f"--layout={layout}: this run trained the whole network, which is written as a folder "
            "of diffusers. Leave --layout away."
        )
    if experiment.lora is None and draws:
        raise ConfigError(
            "--prompt: clips are drawn with adapters alone. Put the exported folder in place of "
            "the pretrained model's `transformer`, and draw by python -m vdx.sample --weights=..."
        )


def _no_layout(reason: str) -> str:
    return (
        "Only Wan networks and their adapters are written for other programs, and the network of "
        f"this run is another: {reason} Draw with it by python -m vdx.sample --workdir=..."
    )


def write_weights(
    experiment: Experiment,
    workdir: Path,
    step: str | None,
    places: Places,
    layout: str,
    data: DataSummary,
) -> int:
    """Write the averaged weights of a step, and return its number.

    Raises CheckpointError.
    """
    # The mesh of training may be larger than this machine. Adapters fit on one device.
    mesh = MeshSpec(data=1, fsdp=-1).make()
    if experiment.lora is not None:
        mesh = MeshSpec().make(jax.devices()[:1])
    with jax.set_mesh(mesh):
        trained = open_trained(experiment, workdir, mesh, step=step)
        if experiment.lora is None:
            _write_network(experiment, trained.params, places.weights)
        else:
            places.weights.parent.mkdir(parents=True, exist_ok=True)
            write_lora(
                places.weights,
                trained.params,
                experiment.model,
                experiment.lora.scale,
                layout,
                metadata=file_metadata(experiment, trained.step, data),
            )
    return trained.step


def _write_network(experiment: Experiment, params: Params, folder: Path) -> None:
    """Write a whole network as a folder of diffusers."""
    model = experiment.model
    rows = wan_transformer_rows(model)
    shapes = {key: shape for key, (shape, _) in export_plan(params, rows).items()}
    dims = model.backbone.dims()
    save_folder(params, rows, wan_config(shapes, dims.width // dims.heads), folder)


def sample_request(
    experiment: Experiment, pipeline: PretrainedPipeline, prompts: Sequence[str], image: str | None
) -> PretrainedRequest:
    """Return the checked request of sample clips, without the adapters.

    They are no file yet. The clips have the size of the first training clip, if the data are at
    hand.
    """
    sampling = experiment.sampling
    settings: dict[str, Any] = {"steps": sampling.steps, "guidance": sampling.guidance}
    try:
        example = latent_examples(experiment.source(), 1)[0]
    except (ConfigError, DataError, OSError):
        print("The data of the run are not here: clips have the size that the makers recommend.")
    else:
        frames, height, width, _ = example["latents"].shape
        rate, side = pipeline.model.components["vae"].module.rates
        settings["num_frames"] = 1 + (frames - 1) * rate
        settings |= {"height": height * side, "width": width * side, "fps": float(example["fps"])}
    return pipeline.request(prompts, image=image, **settings)


def draw_clips(pipeline: PretrainedPipeline, request: PretrainedRequest, places: Places) -> None:
    """Draw the clips of a request with the exported adapters, and write them."""
    adapted = dataclasses.replace(request, lora=(str(places.weights),)).with_digests()
    write_stream(pipeline.stream(adapted), adapted, pipeline.weights(), places.clips)
