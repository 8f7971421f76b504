"""The stage of vdx.prepare that encodes: kept clips become cached latents.

Reads clips.jsonl and the clips of the cache. `vdx.preparation.encoders` fills the cache, on every
host its share. The first host writes `DIR/latents`, which `config.data.path=DIR` reads.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vdx.config.build import ConfigError, fill
from vdx.data.folders import validation_names
from vdx.data.preparation.clips import clip_key
from vdx.data.preparation.pieces import LatentSettings
from vdx.data.preparation.shards import ShardRow, write_shards
from vdx.data.preparation.stages import Preparation, kept_rows
from vdx.data.records import latent_features
from vdx.files import printable, read_rows
from vdx.preparation.encoder_model import EncoderModel, open_encoders
from vdx.preparation.encoders import ClipFile, Encoders, read_arrays
from vdx.preparation.processes import wait_for_all

__all__ = ["LatentStage"]

Row = Mapping[str, Any]
NAMED = 5  # clips of a reason that are named


class Entry(NamedTuple):
    """A clip that is kept."""

    row: Row  # of clips.jsonl
    clip: ClipFile


class LatentStage:
    """Encodes the kept clips of a folder with the encoders of a pretrained model."""

    def __init__(self, preparation: Preparation, weights: Path) -> None:
        """Open the model; reads headers. Raises ConfigError and WeightsError."""
        self.preparation = preparation
        self.settings = fill(LatentSettings, preparation.latents, "config.latents")
        self.model = open_encoders(weights, self.settings.dtype)
        check_model(self.model, self.settings)

    def run(self) -> None:
        """Encode what is not in the cache, and write the data set."""
        encoders = Encoders(self.model, self.settings, self.preparation.out / "cache")
        if jax.process_index() == 0:
            encoders.remove_parts()
        wait_for_all("vdx: clips are written")

        entries = self._entries()
        clips = [entry.clip for entry in entries]
        encoders.encode_clips(clips)
        encoders.encode_captions(["", *(_caption(entry.row) for entry in entries)])
        wait_for_all("vdx: pieces are encoded")
        encoders.encode_images(clips)
        wait_for_all("vdx: everything is encoded")
        if jax.process_index() == 0:
            self._write(entries, encoders)

    def _entries(self) -> list[Entry]:
        """Return the clips that are kept, as the earlier stages have left them."""
        out = self.preparation.out
        sha256 = {row["source"]: row["sha256"] for row in read_rows(out / "sources.jsonl")}
        entries = []
        for row in kept_rows(read_rows(out / "clips.jsonl")):
            key = clip_key(sha256[row["source"]], row, self.preparation.clip_settings)
            name = f"{row['source']} at {row['start']:.2f} s"
            entries.append(Entry(row, ClipFile(key, self.preparation.clips.path(key), name)))
        return entries

    def _write(self, entries: Sequence[Entry], encoders: Encoders) -> None:
        """Write the data set. Raises ConfigError if no clip has a piece."""
        shard_settings = self.preparation.shard_settings
        sources = [entry.row["source"] for entry in entries]
        validation = validation_names(sources, shard_settings.validation_fraction)
        splits: dict[str, list[ShardRow]] = {"train": [], "validation": []}
        refused: dict[str, list[str]] = collections.defaultdict(list)
        shapes: dict[str, list[tuple[int, ...]]] = collections.defaultdict(list)
        for entry in entries:
            arrays = encoders.read_clip(entry.clip.key)
            if "reason" in arrays:
                refused[str(arrays["reason"])].append(entry.clip.name)
                continue
            name = "validation" if entry.row["source"] in validation else "train"
            splits[name] += self._rows(entry, arrays, encoders)
            for signal in encoders.signals:
                shapes[signal].append(arrays[signal].shape[1:])
        self._report(entries, splits, refused)

        common = {signal: _common_shape(found) for signal, found in shapes.items()}
        null = read_arrays(encoders.text.path(encoders.text_key("")))["text"]
        text = [self.model.longest, null.shape[1]]
        signals = {name: shape for name, shape in common.items() if name != "latents"}
        metadata = {
            **common,
            "text": text,
            "null": np.asarray(null[0] if len(null) == 1 else null, np.float32).tolist(),
            "weights": encoders.identities,
        }
        out = self.preparation.out / "latents"
        wrote = write_shards(
            out,
            splits,
            latent_features(common["latents"], null.shape[1], **signals),
            functools.partial(_example, encoders),
            shard_settings.per_shard,
            metadata,
        )
        sizes = ", ".join(f"{len(rows)} for {name}" for name, rows in splits.items())
        print(f"{out}: {sizes}{'' if wrote else ', as before'}", flush=True)

    def _rows(self, entry: Entry, arrays: Row, encoders: Encoders) -> list[ShardRow]:
        """Return the records of the pieces of a clip."""
        key = encoders.latent_key(entry.clip.key)
        rows = []
        for number, start in enumerate(arrays["start"].tolist()):
            facts = {
                "clip": entry.clip.key,
                "piece": number,
                "caption": _caption(entry.row),
                "fps": self.settings.fps,
                "num_frames": 1 + self.model.rate * (arrays["latents"].shape[1] - 1),
                "key": f"{entry.row['source']} at {entry.row['start'] + start:.3f} s",
            }
            rows.append(ShardRow(f"{key}-{number:05d}", facts))
        return rows

    def _report(
        self,
        entries: Sequence[Entry],
        splits: Mapping[str, Sequence[ShardRow]],
        refused: Mapping[str, Sequence[str]],
    ) -> None:
        """Print what is used of the kept clips. Raises ConfigError if nothing is."""
        for reason, names in sorted(refused.items()):
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            line = f"Left out, {len(names)} clips, {reason}: {', '.join(names[:NAMED])}{more}"
            print(printable(line), flush=True)
        rows = [row for own in splits.values() for row in own]
        if not rows:
            raise ConfigError(
                "No clip fills a piece: the lines above say why. Change config.latents "
                "(num_frames, height, width, fps) or config.decide.min_seconds."
            )
        kept = sum(entry.row["end"] - entry.row["start"] for entry in entries)
        used = sum(row.facts["num_frames"] / row.facts["fps"] for row in rows)
        print(
            f"{len(rows)} pieces hold {used:.1f} of the {kept:.1f} seconds that are kept; the rest "
            "is shorter than a piece, or left out.",
            flush=True,
        )


def check_model(model: EncoderModel, settings: LatentSettings) -> None:
    """Raise ConfigError for pieces that cannot be encoded."""
    for shape in settings.shapes:
        frames = shape.frames or 0
        if (frames - 1) % model.rate or any(side % model.unit for side in shape.size):
            height, width = shape.size
            raise ConfigError(
                f"config.latents: pieces of {frames} frames of {height}x{width} do not fit "
                f"{model.path}: expected 1 + {model.rate}n frames, and sides that are multiples of "
                f"{model.unit}."
            )


def _caption(row: Row) -> str:
    return row["caption"] or ""


def _common_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int | None, ...]:
    """Return the shape that all have, with None where they differ."""
    return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))


def _example(encoders: Encoders, row: ShardRow) -> dict[str, Any]:
    """Return the features of a piece."""
    facts = dict(row.facts)
    clip = facts.pop("clip")
    number = facts.pop("piece")
    arrays = encoders.read_clip(clip)
    text = read_arrays(encoders.text.path(encoders.text_key(facts["caption"])))["text"]
    return {**facts, "text": text, **{name: arrays[name][number] for name in encoders.signals}}
