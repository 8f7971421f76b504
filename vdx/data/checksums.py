"""Checksums of a folder of videos: python -m vdx.data.checksums FOLDER

Writes the SHA-256 of every video into `metadata.jsonl`, which is made from the text files beside
the videos where there is none. Training then refuses a file that has changed since. A checksum
that is there is compared, never replaced, unless --update says so.
"""

import hashlib
from pathlib import Path
from typing import Any

from absl import app, flags
from tqdm import tqdm

from vdx.data.sources import list_videos, read_metadata
from vdx.files import append_rows, atomic_write

FLAGS = flags.FLAGS


def add_checksums(folder: Path, update: bool = False) -> dict[str, list[str]]:
    """Adds "sha256" to every row of the folder's `metadata.jsonl`, and keeps all other keys.

    Gives names of files: "new" had no checksum, "same" and "changed" had one, "missing" cannot
    be read; their rows stay as they are. Raises ValueError, and writes nothing, if a file has
    changed and `update` is false.
    """
    path, rows = folder / "metadata.jsonl", _rows(folder)
    found: dict[str, list[str]] = {"new": [], "same": [], "changed": [], "missing": []}
    for row in tqdm(rows, unit="file", desc="SHA-256", dynamic_ncols=True):
        name, before = row["file_name"], row.get("sha256")
        try:
            with (folder / name).open("rb") as file:
                row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            found["missing"].append(name)
            continue
        kind = "new" if before is None else "same" if before == row["sha256"] else "changed"
        found[kind].append(name)
    if found["changed"] and not update:
        raise ValueError(
            f"{_some(found['changed'])} changed since their checksums were written. "
            "Restore them, or accept them by --update. Nothing was written."
        )
    with atomic_write(path) as part:
        append_rows(part, rows)
    return found


def _rows(folder: Path) -> list[dict[str, Any]]:
    if (folder / "metadata.jsonl").exists():
        return read_metadata(folder / "metadata.jsonl")
    rows = []
    for name, caption, *_ in list_videos(folder):
        text = caption.read_text(encoding="utf-8").strip() if caption else None
        rows.append({"file_name": name} | ({} if text is None else {"caption": text}))
    if not rows:
        raise ValueError(f"{folder} holds neither metadata.jsonl nor videos with text files.")
    return rows


def _some(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} files ({', '.join(names[:most])}{more})"


def main(argv):
    if len(argv) != 2:
        raise app.UsageError("Give one folder: python -m vdx.data.checksums FOLDER")
    try:
        found = add_checksums(Path(argv[1]), FLAGS.update)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print("; ".join(f"{kind}: {len(names)}" for kind, names in found.items()))
    if found["missing"]:
        print(f"{_some(found['missing'])} cannot be read; their rows have no new checksum.")


if __name__ == "__main__":
    flags.DEFINE_bool("update", False, "Replace the checksums of files that have changed.")
    app.run(main)
