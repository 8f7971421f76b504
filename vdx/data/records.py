"""Layout of records on disk: encoded videos, or latents and text computed once.

Records are ArrayRecord files prepared by tensorflow_datasets, which needs no TensorFlow for
this. `metadata.json` next to cached latents says which encoder and weights made them, so that a
stale cache can be distinguished from a fresh one.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vdx.data.record import BadRecord
from vdx.files import read_json

if TYPE_CHECKING:  # importing it takes a second, which other sources save
    from tensorflow_datasets.core import GeneratorBasedBuilder
    from tensorflow_datasets.features import FeaturesDict

__all__ = [
    "check_classes",
    "check_latents",
    "clip_features",
    "latent_features",
    "ready_example",
    "video_features",
    "write_records",
]

Row = Mapping[str, Any]

CLASSES = {
    f"tensorflow_datasets.core.features.{name}"
    for name in (
        "features_dict.FeaturesDict",
        "scalar.Scalar",
        "tensor_feature.Tensor",
        "text_feature.Text",
    )
}

# Files of a prepared directory that name classes, and the keys under which they do.
# "type" is the key of older versions.
CLASS_KEYS = {
    "features.json": {"pythonClassName", "python_class_name", "type"},
    "dataset_info.json": {"pythonClassName", "python_class_name"},
}

# Batch keys of signals that a record may contain: see vdx.models.conditioning.signals and
# vdx.models.conditioning.control_signals.
SIGNALS = ("concat", "control", "image_tokens", "depth", "pose", "flow", "camera", "motion")


def video_features() -> "FeaturesDict":
    """Return the features of encoded videos: video (bytes of an mp4), caption, key."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "video": tfds.features.Tensor(shape=(), dtype=np.object_),
            "caption": tfds.features.Text(),
            "key": tfds.features.Text(),
        }
    )


def clip_features(measures: Iterable[str] = ()) -> "FeaturesDict":
    """Return the features of clips that `vdx.prepare` encodes.

    Those of encoded videos, and: source, the file; start and end in it, seconds; timestamps [t] of
    the frames, seconds from the clip's start; fps; motion, see `vdx.data.motion`; audio, int16
    [samples], at audio_rate; and numbers by the names of measures, -1 where unknown.
    """
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            **video_features(),
            "source": tfds.features.Text(),
            "start": np.float32,
            "end": np.float32,
            "timestamps": tfds.features.Tensor(shape=(None,), dtype=np.float32),
            "fps": np.float32,
            "motion": np.float32,
            "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
            "audio_rate": np.int32,
            **dict.fromkeys(measures, np.float32),
        }
    )


def latent_features(
    latents: tuple[int | None, ...], text_dim: int, **signals: tuple[int | None, ...]
) -> "FeaturesDict":
    """Return the features of cached latents.

    latents: the shape [t h w c] of float16 latents, normalised; None where it varies.
    text_dim: d of the text, float16 [l d]; only the real tokens are stored, so l varies.
    signals: shapes of further arrays, float16, by their names in SIGNALS. Wan's image-to-video
      reads `concat` [t h w 4 + c], the mask of known frames and their latents, and `image_tokens`
      [m d], CLIP's features of the first frame. Maps have the latents' size.

    Other features: caption, the source of the text; fps, frames per second; num_frames, pixel
    frames; key, the name of the clip.
    """
    import tensorflow_datasets as tfds

    def half(shape: tuple[int | None, ...]) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=tuple(shape), dtype=np.float16)

    return tfds.features.FeaturesDict(
        {
            "latents": half(latents),
            "text": half((None, text_dim)),
            "caption": tfds.features.Text(),
            "fps": np.float32,
            "num_frames": np.int32,
            "key": tfds.features.Text(),
            **{name: half(shape) for name, shape in signals.items()},
        }
    )


def check_classes(path: Path) -> None:
    """Raise ValueError if a prepared directory names a class other than CLASSES.

    TFDS imports the module of every class that `features.json` or `dataset_info.json` names. That
    would run code that the author of the data chose.
    """
    for file, keys in CLASS_KEYS.items():
        if not (path / file).exists():
            continue
        unknown = set(_texts_under(read_json(path / file), keys)) - CLASSES
        if unknown:
            raise ValueError(
                f"{path / file} names the class {min(unknown)!r}; known are "
                f"{', '.join(sorted(CLASSES))}."
            )


def _texts_under(value: Any, keys: set[str]) -> Iterator[str]:
    """Yield the texts under any of the keys, at any depth of a JSON value."""
    if isinstance(value, list):
        for inner in value:
            yield from _texts_under(inner, keys)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in keys and isinstance(inner, str):
                yield inner
            else:
                yield from _texts_under(inner, keys)


def check_latents(row: Row, key: str, metadata: Mapping[str, Any]) -> None:
    """Raise BadRecord if a row does not match `metadata`.

    metadata: for "latents" and names of SIGNALS the expected shape, with None where it varies;
      for "text" the shape [longest l, d]. What it leaves out is not compared.
    """
    # Shapes, as far as the metadata fixes them.
    arrays = ["latents", *(name for name in SIGNALS if name in row)]
    for name in arrays:
        axes = 4 if name == "latents" else np.ndim(row[name])
        expected = tuple(metadata.get(name) or (None,) * axes)
        found = np.shape(row[name])
        if not _fits(found, expected):
            raise BadRecord(key, f"{name} have the shape {found}, expected {expected}")

    _check_text(np.shape(row["text"]), key, metadata)

    # Numbers.
    for name in [*arrays, "text"]:
        if not np.isfinite(np.asarray(row[name], np.float16)).all():
            raise BadRecord(key, f"{name} hold NaN or infinity, in float16")
    if not (row["fps"] > 0 and row["num_frames"] > 0):
        raise BadRecord(
            key, f"fps = {row['fps']} and num_frames = {row['num_frames']}; both must be positive"
        )


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Return true if a shape is the expected one; None fits any size."""
    return len(shape) == len(expected) and all(
        want in (None, have) for want, have in zip(expected, shape, strict=True)
    )


def _check_text(shape: tuple[int, ...], key: str, metadata: Mapping[str, Any]) -> None:
    """Raise BadRecord if text of a shape does not match `metadata["text"]`."""
    longest, width = metadata.get("text") or (None, None)
    if not _fits(shape, (None, width)):
        raise BadRecord(key, f"text has the shape {shape}, expected (l, {width})")
    if longest is not None and shape[0] > longest:
        raise BadRecord(key, f"text has {shape[0]} tokens, at most {longest} expected")


def ready_example(row: Row, key: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as an example of a batch, its text padded and masked.

    Keys: latents float16 [t h w c], text float16 [longest d], text_mask bool [longest],
    fps float32, num_frames int32, key, and the arrays of SIGNALS that the row contains.
    Raises BadRecord if the row does not match `metadata`.
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
    splits: Mapping[str, Iterable[Row]],
    features: "FeaturesDict",
    *,
    shards: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a data set that `Records(path)` reads.

    It appears at `path` complete or not at all.

    splits: name -> examples, each a dict with the keys of `features`; their order is kept.
    features: `video_features()` or `latent_features(...)`.
    shards: files in a split; None leaves the choice to TFDS, by size.
    metadata: JSON values stored with the data; for latents see `check_latents`. Under "null" it
      has the text encoder's output [d] for the empty caption, for models trained with it.

    Raises ValueError if `path` exists or an example does not fit; it then leaves nothing behind.
    """
    import tensorflow_datasets as tfds

    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} is already there: remove it, or write elsewhere.")
    path.parent.mkdir(parents=True, exist_ok=True)

    # Written below a hidden folder next to `path`, then moved there in one step.
    download = tfds.download.DownloadConfig(num_shards=shards, try_download_gcs=False)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        builder = _builder(scratch, splits, features, dict(metadata or {}))
        builder.download_and_prepare(download_config=download)
        shutil.move(builder.data_dir, path)
    return path


def _builder(
    directory: str,
    splits: Mapping[str, Iterable[Row]],
    features: "FeaturesDict",
    metadata: dict[str, Any],
) -> "GeneratorBasedBuilder":
    """Return the TFDS builder that writes examples below a directory."""
    import tensorflow_datasets as tfds

    class Builder(
        tfds.core.GeneratorBasedBuilder,  # type: ignore[call-arg]
        skip_registration=True,
    ):
        """A data set whose examples are already in this process."""

        name = "vdx"
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # nothing to download; TFDS would look for checksums next to this file

        # The methods that TFDS calls.
        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                features=features,
                disable_shuffling=True,
                metadata=tfds.core.MetadataDict(metadata),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
            return {name: _numbered(examples, metadata) for name, examples in splits.items()}

        def _generate_examples(self) -> Iterator[tuple[int, dict]]:
            raise NotImplementedError  # _split_generators returns the generators themselves

    return Builder(data_dir=directory, file_format="array_record")


def _numbered(
    examples: Iterable[Row], metadata: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield examples with their numbers, cached arrays checked and cast to float16."""
    for number, example in enumerate(examples):
        row = dict(example)
        if "latents" in row:
            check_latents(row, str(row.get("key", number)), metadata)
            for name in ("latents", "text", *SIGNALS):
                if name in row:
                    row[name] = np.asarray(row[name], np.float16)
        yield number, row
