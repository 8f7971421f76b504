"""Figures of the curation of footage with known cuts and known near-duplicates.

    python benchmarks/curation.py --out=benchmarks/curation.json

Footage is drawn from a seed that no threshold was set on; `--photographs=FOLDER` adds images and
videos of one's own as backgrounds. A hard cut counts as found within a frame, a gradual transition
if at least half of what it and the found one span together is shared.
"""

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from vdx.config.build import fill
from vdx.config.loader import resolve
from vdx.data.curation.caption import Caption
from vdx.data.curation.decide import DecideSettings, decide
from vdx.data.curation.look import LookSettings, look
from vdx.files import write_json

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.data.planted_footage import COPIES, Planted, make_copy, make_footage  # noqa: E402

FLAGS = flags.FLAGS
Row = dict[str, Any]


def settings() -> DecideSettings:
    """Return the settings of configs/prepare.py, for footage without captions."""
    config = resolve(str(ROOT / "configs" / "prepare.py"), [])
    return fill(DecideSettings, config["decide"] | {"caption_required": False}, "decide")


def figures(what: str, found: int, false: int, planted: int) -> Row:
    """Return precision, recall and F1 of `found` right and `false` wrong ones."""
    precision = found / max(found + false, 1)
    recall = found / max(planted, 1)
    f1 = 2 * found / max(found + false + planted, 1)
    return {"what": what, "precision": precision, "recall": recall, "f1": f1, "planted": planted}


def cut_figures(
    footage: Sequence[Planted], looks: Mapping[str, Row], cut_score: float
) -> list[Row]:
    """Return the figures of hard cuts and of gradual transitions."""
    hard = [0, 0, 0]  # found, false, planted
    gradual = [0, 0, 0]
    for planted in footage:
        cuts = [cut for cut in looks[planted.path.name]["cuts"] if cut["score"] >= cut_score]
        times = [round(cut["time"] * planted.fps) for cut in cuts if cut["kind"] == "hard"]
        spans = [
            (cut["start"] * planted.fps, cut["end"] * planted.fps)
            for cut in cuts
            if cut["kind"] == "gradual"
        ]
        _match(hard, times, planted.hard, lambda one, other: abs(one - other) <= 1)
        _match(gradual, spans, planted.gradual, lambda one, other: _shared(one, other) >= 0.5)
    return [figures("hard cuts", *hard), figures("gradual transitions", *gradual)]


def _match(counts: list[int], found: Sequence[Any], planted: Sequence[Any], agree: Any) -> None:
    """Add the right, the wrong and the planted ones of a file; each planted one counts once."""
    left = list(planted)
    for item in found:
        match = next((other for other in left if agree(item, other)), None)
        if match is None:
            counts[1] += 1
            continue
        left.remove(match)
        counts[0] += 1
    counts[2] += len(planted)


def _shared(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Return the intersection of two spans over their union."""
    union = max(one[1], other[1]) - min(one[0], other[0])
    return max(min(one[1], other[1]) - max(one[0], other[0]), 0) / union


def duplicate_figures(rows: Sequence[Row], copies: Sequence[str]) -> Row:
    """Return the figures of near-duplicates: all clips of the files `copies`, no others."""
    long_enough = [row for row in rows if "too_short" not in row["reasons"]]
    is_found = ["duplicate" in row["reasons"] for row in long_enough]
    is_planted = [row["source"] in copies for row in long_enough]
    right = sum(a and b for a, b in zip(is_found, is_planted, strict=True))
    return figures("near-duplicates", right, sum(is_found) - right, sum(is_planted))


def measure(folder: Path) -> list[Row]:
    """Return the rows of the table."""
    photographs = Path(FLAGS.photographs) if FLAGS.photographs else None
    footage = make_footage(FLAGS.seed, folder, FLAGS.sources, photographs)
    paths = [planted.path for planted in footage]
    copies = []
    for number, planted in enumerate(footage[::2]):
        copies.append(folder / f"z_{number:03d}.mp4")  # of equal clips the first by name is kept
        make_copy(planted, copies[-1], COPIES[number % len(COPIES)])

    start = time.process_time()
    looks = {path.name: look(path, LookSettings()).to_json() for path in paths}
    seconds = time.process_time() - start
    footage_seconds = sum(planted.frames / planted.fps for planted in footage)
    looks |= {path.name: look(path, LookSettings()).to_json() for path in copies}

    chosen = settings()
    captions: dict[str, Caption] = {}
    rows = decide(looks, captions, chosen)
    return [
        *cut_figures(footage, looks, chosen.cut_score),
        duplicate_figures(rows, [path.name for path in copies]),
        {"what": "look", "source_seconds_per_cpu_second": footage_seconds / seconds},
    ]


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def main(_: Sequence[str]) -> None:
    """Print the table, and write it if asked."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    for row in rows:
        values = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(", ".join(values))
    if FLAGS.out:
        write_json(FLAGS.out, {"processor": processor(), "rows": rows})


if __name__ == "__main__":
    flags.DEFINE_integer("seed", 7, "of the footage")
    flags.DEFINE_integer("sources", 16, "files with cuts; half as many copies")
    flags.DEFINE_string("photographs", None, "folder of images and videos as backgrounds")
    flags.DEFINE_string("out", None, "JSON file")
    app.run(main)
