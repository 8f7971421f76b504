"""Checksums of a folder of videos.

    python -m vdx.data.checksums FOLDER

Writes the SHA-256 of every video into `metadata.jsonl`. Where there is none, it is made from the
text files of the videos. Training then refuses a file that has changed since. An existing
checksum is compared, and replaced only with --update.
"""

import hashlib
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from vdx.data.folders import NO_CAPTION, list_videos, names_on_disk, stored_name
from vdx.data.metadata import read_metadata
from vdx.files import append_rows, atomic_write, open_regular, printable, warn_once
from vdx.programs import run_program
from vdx.text_files import MAX_CAPTION_BYTES, read_text

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
    on_disk = names_on_disk(folder)
    found: dict[str, list[str]] = {"new": [], "same": [], "changed": [], "missing": []}

    # Read every file that is there.
    for row in tqdm(rows, unit="file", desc="SHA-256", dynamic_ncols=True):
        before = row.get("sha256")
        try:
            with open_regular(folder / stored_name(row["file_name"], on_disk)) as file:
                row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError):
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

    listing = list_videos(folder)
    if any(listing.left_out.values()):
        warn_once(str(listing))
    if not listing.entries:
        raise ValueError(f"{folder} contains neither metadata.jsonl nor videos with text files.")
    rows: list[dict[str, Any]] = [
        {"file_name": entry.name, "caption": read_text(entry.caption, MAX_CAPTION_BYTES).strip()}
        for entry in listing.entries
    ]
    return rows + [{"file_name": name} for name in listing.left_out[NO_CAPTION]]


def _list_names(names: list[str]) -> str:
    """Return the number of files and the first MAX_NAMED names."""
    listed = ", ".join(names[:MAX_NAMED])
    if len(names) > MAX_NAMED:
        listed += f" and {len(names) - MAX_NAMED} more"
    return f"{len(names)} files ({listed})"


def main(folder: str) -> None:
    """Add checksums to one folder and print how many files were of each kind."""
    found = add_checksums(Path(folder), FLAGS.update)
    print("; ".join(f"{kind}: {len(names)}" for kind, names in found.items()))
    if found["missing"]:
        names = printable(_list_names(found["missing"]))
        print(f"{names} cannot be read; their rows have no new checksum.")


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_bool("update", False, "Replace the checksums of files that have changed.")


if __name__ == "__main__":
    run_program(main, define_flags, argument="FOLDER")
