"""A reader of text in images: the extra `text`, whose package has its weights."""

import functools
from typing import Any, NamedTuple

import numpy as np

from vdx.extras import import_extra

__all__ = ["TextLine", "read_text_lines"]

LEAST_SCORE = 0.6  # of the reader; textures are read with less
LEAST_LETTERS = 3


class TextLine(NamedTuple):
    """A line of text, its place in shares of the image's width and height."""

    text: str
    left: float
    top: float
    right: float
    bottom: float


@functools.cache
def _reader() -> Any:
    """Return the reader, on one thread: by default it would spin on all cores."""
    import_extra("onnxruntime", "text")
    rapidocr = import_extra("rapidocr", "text")
    return rapidocr.RapidOCR(
        params={
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Global.use_cls": False,  # text upside down is not read
            "Global.log_level": "error",
        }
    )


def read_text_lines(frame: np.ndarray) -> list[TextLine]:
    """Return the lines of text of a frame uint8 [H W 3].

    Raises ConfigError if the extra is not installed.
    """
    found = _reader()(np.ascontiguousarray(frame[..., ::-1]))  # BGR
    if found.boxes is None:
        return []
    size = frame.shape[1::-1]
    lines = []
    for corners, text, score in zip(found.boxes, found.txts, found.scores, strict=True):
        letters = sum(letter.isalnum() for letter in text)
        if score >= LEAST_SCORE and letters >= LEAST_LETTERS:
            low = np.clip(corners.min(axis=0) / size, 0, 1)
            high = np.clip(corners.max(axis=0) / size, 0, 1)
            lines.append(TextLine(text, *low.tolist(), *high.tolist()))
    return lines
