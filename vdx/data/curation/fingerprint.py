"""A perceptual hash over time, nearly the same for near-duplicates.

Four times a second, the signs of the 64 lowest coefficients of the image's cosine transform but
the mean, as in pHash (Zauner 2010). Recompression, another size and another brightness change few
signs. A mirrored image has the opposite sign exactly where the horizontal frequency is odd.
"""

from collections.abc import Sequence

import numpy as np

from vdx.data.curation.opencv import opencv

__all__ = ["MIRROR", "RATE", "Fingerprint", "hashes_between"]

RATE = 4  # hashes a second
SIDE = 32  # pixels of the image that is transformed
LEAST_CONTRAST = 3.0  # levels, standard deviation; a flat image has no hash
BLANK = ""  # in place of a hash

# (vertical, horizontal) frequencies, the lowest first.
_FREQUENCIES = sorted(((v, h) for v in range(16) for h in range(16)), key=lambda f: (sum(f), f))
_VERTICAL, _HORIZONTAL = np.array(_FREQUENCIES[1:65]).T
_BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)
MIRROR = _BITS[_HORIZONTAL % 2 == 1].sum()  # signs that change in a mirrored image


class Fingerprint:
    """Hashes of frames that are given one by one; memory holds one of them."""

    def __init__(self) -> None:
        self.hashes: list[str] = []  # 16 hexadecimal digits, or BLANK; at k / RATE seconds
        self._shown: np.ndarray | None = None

    def add(self, time: float, grey: np.ndarray) -> None:
        """Take the next frame uint8 [h w], shown from a time in seconds on."""
        self.finish(time)
        self._shown = grey

    def finish(self, end: float) -> None:
        """Hash the last frame for all samples before its end, in seconds."""
        found = None
        while self._shown is not None and len(self.hashes) / RATE < end - 1e-6:
            found = _hash(self._shown) if found is None else found
            self.hashes.append(found)


def _hash(grey: np.ndarray) -> str:
    """Return the hash of a frame uint8 [h w]."""
    cv2 = opencv()
    image = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if image.std() < LEAST_CONTRAST:
        return BLANK
    coefficients = cv2.dct(image)[_VERTICAL, _HORIZONTAL]
    return f"{int(_BITS[coefficients > 0].sum()):016x}"


def hashes_between(hashes: Sequence[str], start: float, end: float) -> np.ndarray:
    """Return the hashes uint64 [n] of a clip, its times in seconds.

    Blank images have none.
    """
    first = int(np.ceil(start * RATE - 1e-6))
    stop = int(np.ceil(end * RATE - 1e-6))
    return np.array([int(text, 16) for text in hashes[first:stop] if text], np.uint64)
