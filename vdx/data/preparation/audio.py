"""Audio of a clip: 16-bit samples, aligned to its frames."""

import av
import numpy as np
from av.audio.resampler import AudioResampler

from vdx.data.containers import CONTAINERS

__all__ = ["read_audio"]

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
        resampler = AudioResampler("s16", "mono", rate)
        for decoded in container.decode(stream):
            if decoded.time is not None and decoded.time > origin + end:
                break
            for frame in resampler.resample(decoded):
                _place(samples, frame, first, rate)
        for frame in resampler.resample(None):
            _place(samples, frame, first, rate)
    return samples


def _place(samples: np.ndarray, frame: av.AudioFrame, first: float, rate: int) -> None:
    """Write the part of an audio frame that is inside a span."""
    if frame.time is None:
        return
    values = frame.to_ndarray()[0]
    place = round((frame.time - first) * rate)
    low = max(place, 0)
    high = min(place + len(values), len(samples))
    if low < high:
        samples[low:high] = values[low - place : high - place]
