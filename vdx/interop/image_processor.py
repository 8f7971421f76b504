"""The `preprocessor_config.json` of our preprocessing of images for CLIP."""

from collections.abc import Mapping
from typing import Any

from vdx.models.encoders.clip import MEAN, STD

BICUBIC = 3  # Pillow's number for the filter
TOLERANCE = 1e-6  # of means and deviations, which files round


def processor_config(size: int) -> dict[str, Any]:
    """Return the config of what vdx.models.encoders.clip.preprocess does.

    size: height and width of the encoder's images.
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN.astype(float).round(8).tolist(),
        "image_std": STD.astype(float).round(8).tolist(),
    }


def processor_differences(config: Mapping[str, Any], size: int) -> list[str]:
    """List what a model's config does that our preprocessing does not."""
    ours = processor_config(size)
    del ours["image_processor_type"]  # a name alone: CLIPImageProcessorFast does the same
    return [
        f"image_processor: {key} = {config[key]!r}, not {value!r}"
        for key, value in ours.items()
        if key in config and not _same(config[key], value)
    ]


def _same(given: Any, ours: Any) -> bool:
    """Return whether a value of any type means what ours does."""
    if isinstance(ours, float):
        return isinstance(given, int | float) and abs(given - ours) < TOLERANCE
    if isinstance(ours, dict) and not isinstance(given, dict):
        return all(value == given for value in ours.values())  # older files have one number
    if isinstance(ours, list):
        same_length = isinstance(given, list) and len(given) == len(ours)
        return same_length and all(map(_same, given, ours))
    return given == ours
