"""Clips a second that arrive, from files on the disk to a batch: vdx's pipeline and a torch one.

    python benchmarks/data.py --out=benchmarks/data.json

Both take 16 frames at 8 a second from random places of 300 captioned clips of 64x64, at 32x32, in
batches of 16, as configs/t2v_folder.py would. The peer is what torch users write: a Dataset that
seeks and decodes with PyAV and resizes with `interpolate(antialias=True)`, in a DataLoader with
two workers, which is the fastest that two cores gave it. In turns; medians of five. Then a short
training says which share of its time it waits for data.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
from absl import app, flags, logging

from vdx.config.loader import resolve
from vdx.experiment import Experiment
from vdx.files import read_rows
from vdx.main import run
from vdx.train.preemption import PreemptionHandler

FLAGS = flags.FLAGS
ROOT = Path(__file__).parents[1]
CLIPS = ROOT.parent / "shared" / "data" / "fluent_emoji"
FRAMES, FPS, SIDE, BATCH = 16, 8.0, 32, 16


def config(*options: str) -> dict:
    return resolve(
        str(ROOT / "configs" / "t2v_folder.py"),
        [
            f"--config.data.path={FLAGS.data}",
            f"--config.data.clip.num_frames=({FRAMES},)",
            f"--config.data.clip.fps=({FPS},)",
            f"--config.data.height={SIDE}",
            f"--config.data.width={SIDE}",
            f"--config.data.loader.global_batch={BATCH}",
            *options,
        ],
    )


def ours(workers: int) -> Iterator:
    return Experiment(config(f"--config.data.loader.workers={workers}")).batches()


def theirs(workers: int) -> Iterator:
    import torch
    from torch.nn.functional import interpolate

    paths = [p for p in sorted(Path(FLAGS.data).rglob("*.mp4"))]

    class Clips(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            with av.open(str(paths[index])) as file:
                stream = file.streams.video[0]
                length = float(stream.duration * stream.time_base)
                start = np.random.default_rng().random() * max(0.0, length - FRAMES / FPS)
                wanted = (start + np.arange(FRAMES) / FPS) % length
                file.seek(int(wanted.min() / stream.time_base), stream=stream)
                times, frames = [], []
                for frame in file.decode(stream):
                    times.append(frame.time)
                    frames.append(frame.to_ndarray(format="rgb24"))
                    if frame.time > wanted.max():
                        break
            at = np.clip(np.searchsorted(times, wanted + 1e-3, side="right") - 1, 0, None)
            video = torch.from_numpy(np.stack([frames[i] for i in at])).permute(0, 3, 1, 2)
            video = interpolate(video.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
            return video.round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Clips(),
        BATCH,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    return iter(itertools.chain.from_iterable(itertools.repeat(loader)))


WAYS: dict[str, Callable[[], Iterator]] = {
    "vdx, threads": lambda: ours(0),
    "vdx, 2 workers": lambda: ours(2),
    "torch DataLoader, 2 workers": lambda: theirs(2),
    "torch DataLoader, in the process": lambda: theirs(0),
}


def speeds() -> dict[str, list[float]]:
    """{way: clips a second of each turn}; a way starts anew in each, since it reads ahead."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(FLAGS.runs):
        for name, make in WAYS.items():
            batches = make()
            for _ in range(3):
                next(batches)
            begin = time.perf_counter()
            for _ in range(FLAGS.batches):
                next(batches)
            found[name].append(FLAGS.batches * BATCH / (time.perf_counter() - begin))
            if hasattr(batches, "close"):
                batches.close()
            del batches
    return found


def waiting() -> float:
    """The share of a training's time, the median over its log."""
    with tempfile.TemporaryDirectory() as folder, PreemptionHandler() as stop:
        run(
            config(
                "--config.train.steps=60",
                "--config.train.log_every=10",
                "--config.eval={'loss': None}",
                "--config.train.sample_every=0",
                "--config.train.save_every=0",
            ),
            Path(folder),
            stop,
        )
        rows = read_rows(Path(folder) / "metrics.jsonl")
    return statistics.median(r["speed/data_wait"] for r in rows[1:] if "speed/data_wait" in r)


def main(argv):
    if not Path(FLAGS.data).is_dir():
        raise app.UsageError(f"{FLAGS.data} is not there: name a folder of clips with --data.")
    found = speeds()
    rows = [
        {
            "way": name,
            "clips_per_s": round(statistics.median(values), 1),
            "all": [round(v, 1) for v in values],
        }
        for name, values in found.items()
    ]
    share = waiting()
    print("| way | clips / s |\n|---|---|")
    for row in rows:
        print(f"| {row['way']} | {row['clips_per_s']} |")
    print(f"\nA training of t2v_folder waits for data {share:.1%} of its time.")
    Path(FLAGS.out).write_text(
        json.dumps(
            {
                "cores": len(os.sched_getaffinity(0)),
                "load": os.getloadavg(),
                "rows": rows,
                "training_waits": round(share, 4),
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "A .json file.", required=True)
    flags.DEFINE_string("data", str(CLIPS), "A folder of clips and their metadata.jsonl.")
    flags.DEFINE_integer("runs", 5, "Turns.", lower_bound=1)
    flags.DEFINE_integer("batches", 30, "Batches in a turn.", lower_bound=1)
    logging.set_verbosity(logging.WARNING)
    app.run(main)
