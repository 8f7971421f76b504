"""The layout of records on disk: encoded videos, or latents and text computed once.

Records are ArrayRecord files prepared by tensorflow_datasets, which needs no TensorFlow for
this. What cached latents are for is written beside them as `metadata.json` (which encoder,
which weights), so that a stale cache can be told from a fresh one.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vdx.data.record import BadRecord
from vdx.files import read_json

__all__ = [
    "check_classes",
    "check_latents",
    "latent_features",
    "ready_example",
    "video_features",
    "write_records",
]

CLASSES = {
    f"tensorflow_datasets.core.features.{name}"
    for name in (
        "features_dict.FeaturesDict",
        "scalar.Scalar",
        "tensor_feature.Tensor",
        "text_feature.Text",
    )
}

# Batch keys of signals that a record may hold: see vdx.models.conditioning.signals and steering.
SIGNALS = ("concat", "control", "image_tokens", "depth", "pose", "flow", "camera", "motion")


def video_features():
    """Features of encoded videos: video (the bytes of an mp4), caption, key."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "video": tfds.features.Tensor(shape=(), dtype=np.object_),
            "caption": tfds.features.Text(),
            "key": tfds.features.Text(),
        }
    )


def latent_features(
    latents: tuple[int | None, ...], text_dim: int, **signals: tuple[int | None, ...]
):
    """Features of cached latents.

    latents: float16 of this shape [t h w c], normalised; None where it varies.
    text: float16 [l text_dim], only the real tokens, so l varies; caption: their source.
    fps: frames per second; num_frames: pixel frames; key: names the clip.
    signals: shapes of further arrays, float16, by their names in SIGNALS. For Wan's
    image-to-video `concat` [t h w 4 + c], the mask of known frames and their latents, and
    `image_tokens` [m d], CLIP's features of the first frame; maps have the latents' size.
    """
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "latents": tfds.features.Tensor(shape=tuple(latents), dtype=np.float16),
            "text": tfds.features.Tensor(shape=(None, text_dim), dtype=np.float16),
            "caption": tfds.features.Text(),
            "fps": np.float32,
            "num_frames": np.int32,
            "key": tfds.features.Text(),
            **{
                name: tfds.features.Tensor(shape=tuple(shape), dtype=np.float16)
                for name, shape in signals.items()
            },
        }
    )


def check_classes(path: Path) -> None:
    """Raises ValueError if a prepared directory names a class other than those above.

    TFDS imports the module of whatever class `features.json` or `dataset_info.json` names, which
    would run code that the author of the data chose. "type" is how older versions name one.
    """
    for file, keys in (
        ("features.json", {"pythonClassName", "python_class_name", "type"}),
        ("dataset_info.json", {"pythonClassName", "python_class_name"}),
    ):
        if (path / file).exists():
            unknown = set(_named(read_json(path / file), keys)) - CLASSES
            if unknown:
                raise ValueError(
                    f"{path / file} names the class {min(unknown)!r}; known are "
                    f"{', '.join(sorted(CLASSES))}."
                )


def _named(value: Any, keys: set[str]) -> Iterator[str]:
    """The texts under any of the keys, at any depth."""
    if isinstance(value, list):
        for inner in value:
            yield from _named(inner, keys)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from [inner] if key in keys and isinstance(inner, str) else _named(inner, keys)


def check_latents(row: Mapping[str, Any], key: str, metadata: Mapping[str, Any]) -> None:
    """Raises BadRecord if a row is not what `metadata` promises.

    metadata: latents, and the names of SIGNALS: the expected shape with None where it varies;
      text, the shape [longest l, d]. Each may be absent, and is then not compared.
    """
    arrays = ["latents", *(name for name in SIGNALS if name in row)]
    found = {name: np.shape(row[name]) for name in [*arrays, "text"]}
    longest, width = metadata.get("text") or (None, None)
    for name in arrays:
        axes = 4 if name == "latents" else len(found[name])
        shape = tuple(metadata.get(name) or (None,) * axes)
        if len(found[name]) != len(shape) or any(
            want not in (None, have) for want, have in zip(shape, found[name], strict=True)
        ):
            raise BadRecord(key, f"{name} have the shape {found[name]}, expected {shape}")
    if len(found["text"]) != 2 or width not in (None, found["text"][1]):
        raise BadRecord(key, f"text has the shape {found['text']}, expected (l, {width})")
    if longest is not None and found["text"][0] > longest:
        raise BadRecord(key, f"text has {found['text'][0]} tokens, at most {longest} expected")
    for name in found:
        if not np.isfinite(np.asarray(row[name], np.float16)).all():
            raise BadRecord(key, f"{name} hold NaN or infinity, in float16")
    if not (row["fps"] > 0 and row["num_frames"] > 0):
        raise BadRecord(
            key, f"fps = {row['fps']} and num_frames = {row['num_frames']}; both must be positive"
        )


def ready_example(row: Mapping[str, Any], key: str, metadata: Mapping[str, Any]) -> dict:
    """A row as an example of a batch: text padded to the longest and given its mask.

    Gives latents float16 [t h w c], text float16 [longest d], text_mask bool [longest],
    fps float32, num_frames int32, key, and of SIGNALS what is there. Raises BadRecord.
    """
    check_latents(row, key, metadata)
    length = len(row["text"])
    longest = (metadata.get("text") or (length,))[0]
    return {
        "latents": np.asarray(row["latents"]),
        "text": np.pad(row["text"], ((0, longest - length), (0, 0))),
        "text_mask": np.arange(longest) < length,
        "fps": np.float32(row["fps"]),
        "num_frames": np.int32(row["num_frames"]),
        "key": key,
        **{name: np.asarray(row[name]) for name in SIGNALS if name in row},
    }


def write_records(
    path: str | Path,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    features,
    *,
    shards: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a data set that `Records(path)` reads; it appears at `path` whole or not at all.

    splits: name -> examples, each a dict with the features' keys, kept in their order.
    features: `video_features()` or `latent_features(...)`.
    shards: files in a split; None lets TFDS choose by size.
    metadata: JSON values kept with the data; for latents see `check_latents`, and `null` is what
      the text encoder makes of the empty caption, [d], for models that were trained with it.
    Raises ValueError if `path` exists or an example does not fit; nothing is left behind then.
    """
    import tensorflow_datasets as tfds

    path, facts = Path(path), dict(metadata or {})
    if path.exists():
        raise ValueError(f"{path} is already there: remove it, or write elsewhere.")
    path.parent.mkdir(parents=True, exist_ok=True)

    class Builder(
        tfds.core.GeneratorBasedBuilder,  # type: ignore[call-arg]
        skip_registration=True,
    ):
        name, VERSION = "vdx", tfds.core.Version("1.0.0")
        code_path = None  # nothing to download; TFDS would look for checksums beside this file

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=features,
                disable_shuffling=True,
                metadata=tfds.core.MetadataDict(facts),
            )

        def _split_generators(self, dl_manager):
            return {name: _numbered(examples, facts) for name, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError  # _split_generators hands out the generators themselves

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        builder = Builder(data_dir=scratch, file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(num_shards=shards, try_download_gcs=False)
        )
        shutil.move(builder.data_dir, path)
    return path


def _numbered(examples, metadata) -> Iterator[tuple[int, dict]]:
    for number, example in enumerate(examples):
        if "latents" in example:
            check_latents(example, str(example.get("key", number)), metadata)
            example = {
                name: np.asarray(value, np.float16)
                if name in ("latents", "text", *SIGNALS)
                else value
                for name, value in example.items()
            }
        yield number, dict(example)
