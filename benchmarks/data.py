"""Clips a second from files on disk to batches, for vdx's pipeline and a torch one.

    python benchmarks/data.py --out=benchmarks/data.json

Both take 16 frames at 8 frames per second from random places of 300 captioned clips of 64x64, at
32x32, in batches of 16, as configs/t2v_folder.py would. The peer is what torch users write: a
Dataset that seeks and decodes with PyAV and resizes with `interpolate(antialias=True)`, in a
DataLoader with two workers, which is the fastest that two cores gave it. The ways take turns; the
table has medians of five. Then a short training measures the share of its time that it waits for
data.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
FRAMES = 16
FPS = 8.0
SIDE = 32  # pixels
BATCH = 16
WARMUP = 3  # batches before the clock starts, in which buffers fill


def config(*options: str) -> dict[str, Any]:
    """Return the config of t2v_folder on the clips, with further options."""
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


def vdx_batches(workers: int) -> Iterator[Any]:
    """Return the batches of vdx's pipeline."""
    return Experiment(config(f"--config.data.loader.workers={workers}")).batches()


def torch_batches(workers: int) -> Iterator[Any]:
    """Return the batches of a torch DataLoader over the same clips."""
    import torch
    from torch.nn.functional import interpolate

    paths = sorted(Path(FLAGS.data).rglob("*.mp4"))

    class Clips(torch.utils.data.Dataset):
        """Random clips as uint8 tensors [t h w c]."""

        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            frames = torch.from_numpy(read_random_clip(paths[index]))
            video = frames.permute(0, 3, 1, 2).float()  # [t c h w]
            video = interpolate(video, (SIDE, SIDE), mode="bilinear", antialias=True)
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


def read_random_clip(path: Path) -> np.ndarray:
    """Return uint8 [t h w 3] from a random place of a video, as torch users decode it."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        length = float(stream.duration * stream.time_base)
        start = np.random.default_rng().random() * max(0.0, length - FRAMES / FPS)
        wanted = (start + np.arange(FRAMES) / FPS) % length

        # Decode from the key frame before the first frame to the last one.
        file.seek(int(wanted.min() / stream.time_base), stream=stream)
        times = []
        frames = []
        for frame in file.decode(stream):
            times.append(frame.time)
            frames.append(frame.to_ndarray(format="rgb24"))
            if frame.time > wanted.max():
                break

    index = np.clip(np.searchsorted(times, wanted + 1e-3, side="right") - 1, 0, None)
    return np.stack([frames[i] for i in index])


WAYS: dict[str, Callable[[], Iterator[Any]]] = {
    "vdx, threads": lambda: vdx_batches(0),
    "vdx, 2 workers": lambda: vdx_batches(2),
    "torch DataLoader, 2 workers": lambda: torch_batches(2),
    "torch DataLoader, in the process": lambda: torch_batches(0),
}


def measure_speeds() -> dict[str, list[float]]:
    """Return {way: clips a second of each turn}.

    A way starts anew in each turn, since it reads ahead while the others are measured.
    """
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(FLAGS.runs):
        for name, make in WAYS.items():
            batches = make()
            for _ in range(WARMUP):
                next(batches)

            begin = time.perf_counter()
            for _ in range(FLAGS.batches):
                next(batches)
            found[name].append(FLAGS.batches * BATCH / (time.perf_counter() - begin))

            if hasattr(batches, "close"):
                batches.close()
            del batches
    return found


def measure_wait() -> float:
    """Return the share of a training's time spent waiting for data, the median over its log."""
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
    # The first row includes compilation.
    return statistics.median(r["speed/data_wait"] for r in rows[1:] if "speed/data_wait" in r)


def main(argv: Sequence[str]) -> None:
    """Measure every way, print the table and write the numbers as JSON."""
    if not Path(FLAGS.data).is_dir():
        raise app.UsageError(f"{FLAGS.data} is not there: name a folder of clips with --data.")
    rows = [
        {
            "way": name,
            "clips_per_s": round(statistics.median(values), 1),
            "all": [round(value, 1) for value in values],
        }
        for name, values in measure_speeds().items()
    ]
    share = measure_wait()

    print("| way | clips / s |\n|---|---|")
    for row in rows:
        print(f"| {row['way']} | {row['clips_per_s']} |")
    print(f"\nA training of t2v_folder waits for data {share:.1%} of its time.")

    result = {
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "rows": rows,
        "training_waits": round(share, 4),
    }
    Path(FLAGS.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "A .json file.", required=True)
    flags.DEFINE_string("data", str(CLIPS), "A folder of clips and their metadata.jsonl.")
    flags.DEFINE_integer("runs", 5, "Turns.", lower_bound=1)
    flags.DEFINE_integer("batches", 30, "Batches in a turn.", lower_bound=1)
    logging.set_verbosity(logging.WARNING)
    app.run(main)
