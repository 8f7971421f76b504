"""The audio of footage, decoded once in order, as the cells need it."""

import itertools
from collections.abc import Iterator

import av
import numpy as np
from av.audio.resampler import AudioResampler

from vdx.data.containers import CONTAINERS

__all__ = ["RATE", "audio_spans"]

RATE = 16_000  # samples a second
GAP = 0.05  # seconds; less is rounding of times, more is audio that is missing


class _Soundtrack:
    """Samples of a file from a place on; memory holds those of one span."""

    def __init__(self, chunks: Iterator[tuple[float, np.ndarray]]) -> None:
        self.chunks = chunks
        self.held: tuple[int, np.ndarray] | None = None  # place of the first sample, samples
        self.place: int | None = None  # after the last sample read

    def span(self, first: int, last: int) -> np.ndarray:
        """Return samples; where there is no audio there are none."""
        found = []
        while True:
            if self.held is None and not self._read():
                break
            assert self.held is not None
            place, samples = self.held
            found.append(samples[max(first - place, 0) : max(last - place, 0)])
            if place + len(samples) > last:
                break
            self.held = None
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def _read(self) -> bool:
        """Read the next samples; return whether there are any."""
        time, samples = next(self.chunks, (0.0, None))
        if samples is None:
            return False
        stated = round(time * RATE)
        if self.place is None or abs(stated - self.place) > GAP * RATE:
            self.place = stated
        self.held = self.place, samples
        self.place += len(samples)
        return True


def audio_spans(
    path: str, origin: float, edges: Iterator[tuple[float, float]]
) -> Iterator[np.ndarray]:
    """Yield the audio of spans that ascend, float32 [samples], mono in [-1, 1].

    edges: (start, end) in seconds from the first frame shown. origin: time of that frame in the
    container. What does not decode is missing.
    """
    with av.open(
        f"file:{path}", options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    ) as container:
        track = _Soundtrack(_chunks(container, origin))
        for start, end in edges:
            yield track.span(round(start * RATE), round(end * RATE))


def _chunks(
    container: av.container.InputContainer, origin: float
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (seconds from the first frame shown, samples) up to the first damage."""
    resampler = AudioResampler("flt", "mono", RATE)
    frames = container.decode(container.streams.audio[0])
    try:
        for frame in itertools.chain(frames, [None]):
            for part in resampler.resample(frame):
                if part.time is not None:
                    yield part.time - origin, part.to_ndarray()[0]
    except (av.error.FFmpegError, ValueError):
        return
