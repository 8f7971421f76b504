"""Fixed shards: the same records give the same files, on any runner.

Records are sorted by key and split by count. The files are ArrayRecord, with the metadata that
makes them a data set of TFDS.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vdx.data.preparation.store import key_of

if TYPE_CHECKING:  # importing it takes a second
    from tensorflow_datasets.features import FeaturesDict

__all__ = ["ShardRow", "write_shards"]

NAME = "vdx"
# Records in a group would be compressed together; readers at random read one at a time.
GROUP = "group_size:1"
JSON_FILES = ("dataset_info.json", "features.json")


class ShardRow(NamedTuple):
    """A record to write."""

    key: str  # of the cache
    facts: Mapping[str, Any]  # features that are not in the cache, such as the caption


def write_shards(
    path: Path,
    splits: Mapping[str, Sequence[ShardRow]],
    features: "FeaturesDict",
    example: Callable[[ShardRow], Mapping[str, Any]],
    per_shard: int,
    metadata: Mapping[str, Any],
) -> bool:
    """Write a data set of TFDS at `path`, in the place of an older one.

    splits: name -> records, in any order. example: the features of a record. per_shard: records of
    a file. metadata: JSON values that are stored with the data. Returns false, and writes nothing,
    if the same data is already there. Empty splits are left out.
    """
    import tensorflow_datasets as tfds

    ordered = {name: sorted(rows, key=lambda row: row.key) for name, rows in splits.items() if rows}
    digest = key_of(
        splits={name: [list(row) for row in rows] for name, rows in ordered.items()},
        per_shard=per_shard,
        metadata=dict(metadata),
        features=features.to_json(),
    )
    if _digest_of(path) == digest:
        return False

    scratch = path.with_name(f".{path.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=scratch, dataset_name=NAME, filetype_suffix="array_record", split="train"
    )
    infos = [
        _write_split(template.replace(split=name), rows, features, example, per_shard)
        for name, rows in ordered.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=scratch,
        features=features,
        split_infos=infos,
        filename_template=template.replace(split=None),
        check_data=False,  # which needs TensorFlow
        metadata=tfds.core.MetadataDict({**metadata, "digest": digest}),
    )
    for name in JSON_FILES:  # whose keys are in the order of a hash table
        value = json.loads((scratch / name).read_text())
        (scratch / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    _replace(path, scratch)
    return True


def _write_split(
    template: Any,
    rows: Sequence[ShardRow],
    features: "FeaturesDict",
    example: Callable[[ShardRow], Mapping[str, Any]],
    per_shard: int,
) -> Any:
    """Write the files of a split; return its description for TFDS."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serializer = ExampleSerializer(features.get_serialized_info())
    count = math.ceil(len(rows) / per_shard)
    lengths = []
    num_bytes = 0
    for shard in range(count):
        part = rows[shard * per_shard : (shard + 1) * per_shard]
        file = template.sharded_filepath(shard_index=shard, num_shards=count)
        writer = ArrayRecordWriter(str(file), GROUP)
        for row in part:
            encoded = features.encode_example(dict(example(row)))
            record = serializer.get_tf_example(encoded).SerializeToString(deterministic=True)
            writer.write(record)
            num_bytes += len(record)
        writer.close()
        lengths.append(len(part))
    return tfds.core.SplitInfo(
        name=template.split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template
    )


def _digest_of(path: Path) -> str | None:
    """Return the digest that `write_shards` left in a data set; None if there is none."""
    try:
        return str(json.loads((path / "metadata.json").read_text())["digest"])
    except (OSError, ValueError, KeyError):
        return None


def _replace(path: Path, new: Path) -> None:
    """Put a finished folder in the place of an older one."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)
