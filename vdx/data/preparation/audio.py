"""Audio of a clip: 16-bit samples, aligned to its frames."""

from collections.abc import Iterator

import av
import numpy as np
from av.audio.resampler import AudioResampler

from vdx.data.containers import CONTAINERS

__all__ = ["read_audio"]

GAP = 0.05  # seconds; less is rounding of times, more is audio that is missing
LEAD = 0.5  # seconds that are decoded before the clip: decoders of audio need a start


def read_audio(path: str, start: float, end: float, origin: float, rate: int) -> np.ndarray:
    """Return the audio of a span, int16 [samples], mono; empty if there is none.

    Sample k is at the time start + k / rate, in seconds from the first frame shown. Where the file
    has no audio, samples are 0. origin: time of that frame in the container.
    """
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    with av.open(f"file:{path}", "r", options=options) as container:
        if not container.streams.audio:
            return np.zeros(0, np.int16)
        stream = container.streams.audio[0]
        assert stream.time_base is not None
        first = origin + start  # in the container
        container.seek(int(max(first - LEAD, 0) / stream.time_base), stream=stream)

        samples = np.zeros(round((end - start) * rate), np.int16)
        place: int | None = None
        for frame in _resampled(container.decode(stream), origin + end, rate):
            # Containers round times; a frame follows the one before unless there is a gap.
            stated = place
            if frame.time is not None:
                stated = round((frame.time - first) * rate)
            if stated is None:  # nothing states when the audio begins
                continue
            if place is None or abs(stated - place) > GAP * rate:
                place = stated
            values = frame.to_ndarray()[0]
            low = max(place, 0)
            high = min(place + len(values), len(samples))
            if low < high:
                samples[low:high] = values[low - place : high - place]
            place += len(values)
    return samples


def _resampled(frames: Iterator[av.AudioFrame], end: float, rate: int) -> Iterator[av.AudioFrame]:
    """Yield audio as 16-bit mono at a rate, up to a time of the container."""
    resampler = AudioResampler("s16", "mono", rate)
    for frame in frames:
        if frame.time is not None and frame.time > end:
            break
        yield from resampler.resample(frame)
    yield from resampler.resample(None)
