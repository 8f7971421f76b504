"""The preprocessing of images as a config of transformers."""

from typing import Any

from vdx.models.encoders.clip import MEAN, STD


def processor(size: int) -> dict[str, Any]:
    """The preprocessor_config.json of what vdx.models.encoders.clip.preprocess does."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN.astype(float).round(8).tolist(),
        "image_std": STD.astype(float).round(8).tolist(),
    }


def _alike(a: Any, b: Any) -> bool:
    if isinstance(b, float):
        return abs(a - b) < 1e-6
    if isinstance(b, dict) and not isinstance(a, dict):  # of older files
        return set(b.values()) == {a}
    if isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    return a == b
