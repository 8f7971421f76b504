"""The stages of `vdx.prepare` that need no network: list, look, decide, clips.

Each reads what the one before has left on the disk or in the cache, so a killed run is continued by
the same command. Only work whose key is not in the cache is done.
"""

import collections
import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vdx.config.build import ConfigError, fill
from vdx.config.ranges import Count, Decay
from vdx.data.curation.caption import Caption
from vdx.data.curation.decide import DecideSettings, decide
from vdx.data.curation.explain import explain
from vdx.data.curation.look import VERSION, LookSettings, dropped_source, look
from vdx.data.curation.table import MEASURES
from vdx.data.folders import validation_names
from vdx.data.preparation.clips import ClipSettings, ClipSpan, clip_key, make_clips, read_clip
from vdx.data.preparation.runner import BEAM_FOLDER, Runner, WorkerDied
from vdx.data.preparation.shards import ShardRow, write_shards
from vdx.data.preparation.sources import SourceFile, SourceList
from vdx.data.preparation.store import Store, file_sha256, key_of
from vdx.data.records import clip_features
from vdx.files import FileError, append_rows, atomic_write, printable

__all__ = ["Preparation", "PrepareSections", "ShardSettings", "kept_rows"]

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ShardSettings:
    """`config.shards`: the files of a data set."""

    per_shard: Count = 256  # clips of a file
    # Share of the sources whose clips are in "validation", by a hash of the name.
    validation_fraction: Decay = 0.1


@dataclasses.dataclass(frozen=True)
class PrepareSections:
    """The top level of a config of vdx.prepare."""

    decide: Mapping[str, Any]  # fields of DecideSettings
    look: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of LookSettings
    clips: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of ClipSettings
    shards: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of ShardSettings


class Preparation:
    """A folder that is prepared: its settings, its cache and its stages."""

    def __init__(self, out: Path, config: Mapping[str, Any], runner: Runner) -> None:
        """Check the settings. Raises ConfigError."""
        sections = fill(PrepareSections, config, "config")
        self.look_settings = fill(LookSettings, sections.look, "config.look")
        self.decide_settings = fill(DecideSettings, sections.decide, "config.decide")
        self.clip_settings = fill(ClipSettings, sections.clips, "config.clips")
        self.shard_settings = fill(ShardSettings, sections.shards, "config.shards")
        self.out = out
        self.runner = runner
        self.looks = Store(out / "cache", "look", ".json")
        self.clips = Store(out / "cache", "clips", ".npz")

    def remove_parts(self) -> None:
        """Remove the unfinished files that a killed run has left."""
        self.looks.remove_parts()
        self.clips.remove_parts()
        shutil.rmtree(self.out / "cache" / BEAM_FOLDER, ignore_errors=True)
        for name in ("sources", "clips", "prepare"):
            for part in self.out.glob(f".{name}.*.json*"):
                part.unlink()

    def look(self, sources: SourceList) -> dict[str, Row]:
        """Decode what is not in the cache; return the looks as JSON, by source.

        Writes sources.jsonl.
        """
        function = functools.partial(_look_at, settings=self.look_settings, store=self.looks)
        paths = [str(file.path.absolute()) for file in sources.files]
        results = self.runner.map(function, paths, "look")

        looks = {}
        for file, result in zip(sources.files, results, strict=True):
            if isinstance(result, WorkerDied):
                looks[file.name] = dropped_source(None, result).to_json()
            elif "error" in result:
                looks[file.name] = dropped_source(None, OSError(result["error"])).to_json()
            else:
                looks[file.name] = json.loads(self.looks.path(result["key"]).read_bytes())
        _mark_duplicates(looks, sources.files)
        write_rows(self.out / "sources.jsonl", [self._source_row(*item) for item in looks.items()])
        return looks

    def _source_row(self, name: str, look: Row) -> Row:
        """Return a row of sources.jsonl."""
        cuts = [
            {key: cut[key] for key in ("time", "kind", "start", "end")}
            for cut in look["cuts"]
            if cut["score"] >= self.decide_settings.cut_score
        ]
        return {"source": name, **look["source"], "cuts": cuts}

    def decide(self, looks: Mapping[str, Row], sources: SourceList) -> list[Row]:
        """Return the rows of clips.jsonl, which it writes, and print how much is kept."""
        captions: dict[str, Caption] = {file.name: file.caption for file in sources.files}
        rows = decide(looks, captions, self.decide_settings)
        write_rows(self.out / "clips.jsonl", rows)
        print(printable(explain(rows, self.decide_settings)), flush=True)
        return rows

    def encode_clips(
        self, rows: Sequence[Row], looks: Mapping[str, Row], sources: SourceList
    ) -> None:
        """Encode the clips that are kept and not in the cache; write their data set.

        Raises ConfigError if none is kept.
        """
        kept = kept_rows(rows)
        keys = [
            clip_key(looks[row["source"]]["source"]["sha256"], row, self.clip_settings)
            for row in kept
        ]
        spans: dict[str, list[ClipSpan]] = collections.defaultdict(list)
        for key, row in zip(keys, kept, strict=True):
            if not self.clips.has(key):
                span = ClipSpan(key, row["start"], row["end"], row["crop"])
                spans[row["source"]].append(span)

        # One decode a source, for all of its clips.
        paths = {file.name: str(file.path.absolute()) for file in sources.files}
        items = [(paths[name], own) for name, own in spans.items()]
        function = functools.partial(_make_clips, settings=self.clip_settings, store=self.clips)
        for (path, _), result in zip(items, self.runner.map(function, items, "clips"), strict=True):
            if isinstance(result, WorkerDied):
                raise ConfigError(f"{path} cannot be encoded: {result}. It may need more memory.")
            if result:
                raise ConfigError(result)
        self._write_clips(keys, kept)

    def _write_clips(self, keys: Sequence[str], kept: Sequence[Row]) -> None:
        """Write the data set of the clips that are kept."""
        fraction = self.shard_settings.validation_fraction
        validation = validation_names((row["source"] for row in kept), fraction)
        splits: dict[str, list[ShardRow]] = {"train": [], "validation": []}
        for key, row in zip(keys, kept, strict=True):
            name = "validation" if row["source"] in validation else "train"
            splits[name].append(ShardRow(key, _facts(row)))

        features = clip_features([name for name in FEATURES if name in MEASURES])
        wrote = write_shards(
            self.out / "clips",
            splits,
            features,
            self._example,
            self.shard_settings.per_shard,
            metadata={"settings": dataclasses.asdict(self.clip_settings)},
        )
        sizes = ", ".join(f"{len(rows)} for {name}" for name, rows in splits.items())
        print(f"{self.out / 'clips'}: {sizes}{'' if wrote else ', as before'}", flush=True)

    def _example(self, row: ShardRow) -> Row:
        """Return the features of a clip."""
        arrays = read_clip(self.clips.path(row.key).read_bytes())
        video = arrays.pop("video").tobytes()
        return {**arrays, **row.facts, "video": video, "key": row.key}


FEATURES = ("flow_strength", "camera_speed")  # measures that a record has


def kept_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of clips that are kept. Raises ConfigError if there are none."""
    kept = [row for row in rows if row["verdict"] == "keep"]
    if not kept:
        raise ConfigError(
            "No clip is kept, so there is nothing to write. The lines above say which reasons drop "
            "them; clips.jsonl has the reasons and the measures of every clip."
        )
    return kept


def _facts(row: Row) -> Row:
    """Return the features of a clip that its row has."""
    measures = {name: row["measures"].get(name) for name in FEATURES if name in MEASURES}
    return {
        "caption": row["caption"] or "",
        "source": row["source"],
        "start": row["start"],
        "end": row["end"],
        **{name: -1.0 if value is None else value for name, value in measures.items()},
    }


def _look_at(path: str, settings: LookSettings, store: Store) -> dict[str, str]:
    """Look at a file unless it is in the cache; return the key or the error."""
    try:
        sha256 = file_sha256(Path(path))
        key = key_of(
            stage="look", version=VERSION, settings=dataclasses.asdict(settings), sha256=sha256
        )
        store.get(key, lambda: _to_json(look(Path(path), settings).to_json()))
    except (OSError, FileError) as error:
        return {"error": getattr(error, "strerror", None) or str(error)}
    return {"key": key}


def _to_json(value: Row) -> bytes:
    """Return a value as the bytes of JSON, the same on every machine."""
    return json.dumps(value, allow_nan=False).encode()


def _make_clips(
    item: tuple[str, Sequence[Sequence[Any]]], settings: ClipSettings, store: Store
) -> str:
    """Make the clips of a source; return "" or why they cannot be made."""
    path, spans = item
    try:
        make_clips(Path(path), [ClipSpan(*span) for span in spans], settings, store)
    except ValueError as error:
        return str(error)
    return ""


def _mark_duplicates(looks: Mapping[str, Row], files: Sequence[SourceFile]) -> None:
    """Mark files with the bytes of another; one with a caption stays, or the first."""
    groups: dict[str, list[SourceFile]] = collections.defaultdict(list)
    for file in files:
        source = looks[file.name]["source"]
        if source["verdict"] != "drop":
            groups[source["sha256"]].append(file)
    for group in groups.values():
        ordered = sorted(group, key=lambda file: (file.caption == Caption(), file.name))
        for file in ordered[1:]:
            source = looks[file.name]["source"]
            source["verdict"] = "drop"
            source["reasons"] = [*source["reasons"], "duplicate"]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, in place of an older file."""
    with atomic_write(path) as part:
        append_rows(part, rows)
