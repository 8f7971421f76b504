"""Checksums of a folder of videos.

    python -m vdx.data.checksums FOLDER

Writes the SHA-256 of every video into `metadata.jsonl`. Where there is none, it is made from the
text files of the videos. Training then refuses a file that has changed since. An existing
checksum is compared, and replaced only with --update.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from tqdm import tqdm

from vdx.data.sources import list_videos, read_metadata
from vdx.files import FileError, append_rows, atomic_write, open_regular

__all__ = ["add_checksums"]

FLAGS = flags.FLAGS
MAX_NAMED = 10  # files in a message, which a reader can look through


def add_checksums(folder: Path, update: bool = False) -> dict[str, list[str]]:
    """Add "sha256" to every row of the folder's `metadata.jsonl`.

    All other keys are kept.
    Returns names of files by kind: "new" had no checksum, "same" and "changed" had one, "missing"
    cannot be read. Rows of missing files stay as they are. Raises ValueError, and writes nothing,
    if a file has changed and `update` is false.
    """
    path = folder / "metadata.jsonl"
    rows = _read_rows(folder)
    found: dict[str, list[str]] = {"new": [], "same": [], "changed": [], "missing": []}

    # Read every file that is there.
    for row in tqdm(rows, unit="file", desc="SHA-256", dynamic_ncols=True):
        before = row.get("sha256")
        try:
            with open_regular(folder / row["file_name"]) as file:
                row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, FileError):
            kind = "missing"
        else:
            kind = _kind(before, row["sha256"])
        found[kind].append(row["file_name"])

    # Nothing is written unless every change is accepted.
    if found["changed"] and not update:
        raise ValueError(
            f"{_list_names(found['changed'])} changed since their checksums were written. "
            "Restore them, or accept them by --update. Nothing was written."
        )
    with atomic_write(path) as part:
        append_rows(part, rows)
    return found


def _kind(before: str | None, after: str) -> str:
    """Return how a file's checksum compares with the one before."""
    if before is None:
        return "new"
    return "same" if before == after else "changed"


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of `metadata.jsonl`, or new ones from videos and text files."""
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        return read_metadata(metadata)

    rows = []
    for entry in list_videos(folder):
        row = {"file_name": entry.name}
        if entry.caption:
            row["caption"] = entry.caption.read_text(encoding="utf-8").strip()
        rows.append(row)
    if not rows:
        raise ValueError(f"{folder} holds neither metadata.jsonl nor videos with text files.")
    return rows


def _list_names(names: list[str]) -> str:
    """Return the number of files and the first MAX_NAMED names."""
    listed = ", ".join(names[:MAX_NAMED])
    if len(names) > MAX_NAMED:
        listed += f" and {len(names) - MAX_NAMED} more"
    return f"{len(names)} files ({listed})"


def main(argv: Sequence[str]) -> None:
    """Add checksums to one folder and print how many files were of each kind."""
    if len(argv) != 2:
        raise app.UsageError("Give one folder: python -m vdx.data.checksums FOLDER")
    try:
        found = add_checksums(Path(argv[1]), FLAGS.update)
    except ValueError as error:
        raise SystemExit(str(error)) from None

    print("; ".join(f"{kind}: {len(names)}" for kind, names in found.items()))
    if found["missing"]:
        print(f"{_list_names(found['missing'])} cannot be read; their rows have no new checksum.")


if __name__ == "__main__":
    flags.DEFINE_bool("update", False, "Replace the checksums of files that have changed.")
    app.run(main)
