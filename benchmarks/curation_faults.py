"""Precision and recall of the reasons of vdx.prepare on clips with planted faults.

    python -m benchmarks.curation_faults [--seeds=0,1] [--rounds=2] [--text]

Thresholds are those of configs/prepare.py. Photographs are those of scikit-image, or of --photos.
"""

from pathlib import Path

from absl import app, flags

from tests.data.fault_figures import decided, figures, lowest_overlap, speed_error
from tests.data.planted_faults import photographs
from vdx.data.curation.decide import REASONS

FLAGS = flags.FLAGS
flags.DEFINE_list("seeds", ["0", "1"], "One corpus each.")
flags.DEFINE_integer("rounds", 1, "45 clips each.")
flags.DEFINE_list("photos", [], "Files of photographs.")
flags.DEFINE_list("kinds", [], "Functions of tests/data/planted_faults.py; empty: all.")
flags.DEFINE_bool("text", False, "Read text too.")


def main(_: list[str]) -> None:
    photos = photographs([Path(name) for name in FLAGS.photos] or None)
    print("| seed | reason | planted | precision | recall | wrong |")
    print("|---|---|---|---|---|---|")
    for seed in map(int, FLAGS.seeds):
        clips = list(decided(seed, photos, FLAGS.rounds, FLAGS.text, FLAGS.kinds))
        for reason in REASONS:
            found = figures(clips, reason)
            if not FLAGS.text and reason in ("text", "watermark"):
                continue
            wrong = ", ".join(found.wrong)
            row = f"{found.planted} | {found.precision:.2f} | {found.recall:.2f} | {wrong}"
            print(f"| {seed} | {reason} | {row} |", flush=True)
        clean = [clip for clip in clips if not clip.planted.faults]
        kept = sum(clip.row["verdict"] == "keep" for clip in clean)
        print(f"| {seed} | kept of clean | {len(clean)} | | {kept / max(1, len(clean)):.2f} | |")
        if not FLAGS.kinds:
            print(f"| {seed} | crop box, lowest IoU | | | {lowest_overlap(clips):.3f} | |")
            print(f"| {seed} | camera_speed, error | | | {speed_error(clips):.3f} | |")


if __name__ == "__main__":
    app.run(main)
