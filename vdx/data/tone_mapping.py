"""High dynamic range and wide gamuts to SDR in BT.709.

Everything is display-referred, and each step is a published formula:

    signal -> light     PQ: EOTF of BT.2100, table 4. HLG: inverse OETF and OOTF of BT.2100,
                        table 5, for a display of 1,000 cd/m2. SDR: power 2.4 (BT.1886).
    light -> SDR light  HDR: EETF of BT.2390, section 5.4.1, on each component, from 1,000 to
                        203 cd/m2. White of SDR is HDR reference white: BT.2408, section 5.1.
    gamut               linear matrix to the primaries of BT.709, clipped (BT.2407, section 2)
    SDR light -> signal power 1 / 2.4 (BT.1886)

One curve serves all files, whatever their mastering metadata, so that one light is one level.
"""

import functools

import numpy as np

__all__ = ["GAMUTS", "TRANSFERS", "to_sdr"]

PEAK = 1_000.0  # cd/m2: the display that HLG is defined for; brighter PQ light is clipped
WHITE = 203.0  # cd/m2: HDR reference white of BT.2408
SDR_GAMMA = 2.4  # BT.1886
HLG_GAMMA = 1.2  # BT.2100, at PEAK

# Constants of PQ: BT.2100, table 4.
PQ_M1 = 2610 / 16384
PQ_M2 = 2523 / 4096 * 128
PQ_C1 = 3424 / 4096
PQ_C2 = 2413 / 4096 * 32
PQ_C3 = 2392 / 4096 * 32

# Transfers by their numbers in ITU-T H.273.
PQ = 16
HLG = 18
TRANSFERS = (PQ, HLG)

CODES = 65_535  # the largest code of 16 bits
ROWS = 256  # rows of a frame that are converted at once, which bounds memory

# Chromaticities (x, y) of red, green, blue, by their numbers in ITU-T H.273. White is D65.
D65 = (0.3127, 0.3290)
BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
GAMUTS = {
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),  # BT.2020
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # Display P3
}
BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)


def pq_to_light(signal: np.ndarray) -> np.ndarray:
    """Return cd/m2 of PQ signals in [0, 1]: the EOTF of BT.2100, table 4."""
    x = signal ** (1 / PQ_M2)
    return 10_000 * (np.maximum(x - PQ_C1, 0) / (PQ_C2 - PQ_C3 * x)) ** (1 / PQ_M1)


def light_to_pq(light: np.ndarray) -> np.ndarray:
    """Return PQ signals in [0, 1] of cd/m2: the inverse EOTF of BT.2100, table 4."""
    y = (light / 10_000) ** PQ_M1
    return ((PQ_C1 + PQ_C2 * y) / (1 + PQ_C3 * y)) ** PQ_M2


def hlg_to_scene(signal: np.ndarray) -> np.ndarray:
    """Return scene light in [0, 1] of HLG signals: the inverse OETF of BT.2100, table 5."""
    a = 0.17883277
    b = 1 - 4 * a
    c = 0.5 - a * np.log(4 * a)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def compress(light: np.ndarray) -> np.ndarray:
    """Return cd/m2 up to WHITE of cd/m2 up to PEAK: the EETF of BT.2390, section 5.4.1.

    A Hermite spline in PQ signals takes over above the knee. Black stays black.
    """
    peak = light_to_pq(np.array(PEAK))
    signal = light_to_pq(np.minimum(light, PEAK)) / peak  # E1
    largest = light_to_pq(np.array(WHITE)) / peak  # maxLum
    knee = 1.5 * largest - 0.5  # KS

    t = np.maximum(signal - knee, 0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * largest
    )
    return pq_to_light(np.where(signal < knee, signal, spline) * peak)


def gamut_matrix(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Return the matrix from linear RGB of these primaries to that of BT.709, [3 3]."""
    return np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(primaries)


def _to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Return the matrix from linear RGB to CIE XYZ, by SMPTE RP 177."""
    x, y = np.array([*primaries, D65]).T
    columns = np.stack([x / y, np.ones(4), (1 - x - y) / y])  # XYZ at luminance 1
    luminance = np.linalg.solve(columns[:, :3], columns[:, 3])
    return columns[:, :3] * luminance


# ---- Tables, so that a frame needs no powers. Those of light are indexed by its square root,
# which is as fine near black as the eye.


@functools.cache
def _signal_table(transfer: int) -> np.ndarray:
    """Return the light of every 16-bit code, float32; what it is depends on the transfer."""
    signal = np.arange(CODES + 1) / CODES
    if transfer == PQ:
        return (compress(pq_to_light(signal)) / WHITE).astype(np.float32)
    if transfer == HLG:
        return hlg_to_scene(signal).astype(np.float32)
    return (signal**SDR_GAMMA).astype(np.float32)


@functools.cache
def _compress_table() -> np.ndarray:
    """Return SDR light of sqrt(display light / PEAK)."""
    root = np.arange(CODES + 1) / CODES
    return (compress(PEAK * root**2) / WHITE).astype(np.float32)


@functools.cache
def _sdr_table() -> np.ndarray:
    """Return uint8 levels of sqrt(SDR light)."""
    root = np.arange(CODES + 1) / CODES
    return np.rint(255 * root ** (2 / SDR_GAMMA)).astype(np.uint8)


def _lookup(table: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Return the entries of a table for light, clipped to [0, 1]."""
    root = np.sqrt(np.clip(light, 0, 1))
    return table[(root * CODES + 0.5).astype(np.uint16)]


def to_sdr(levels: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Return uint8 [h w 3] in BT.709 of uint16 [h w 3] in another transfer or gamut.

    transfer, primaries: by their numbers in ITU-T H.273. A transfer that is not one of TRANSFERS
    is SDR; primaries that are not in GAMUTS are those of BT.709.
    """
    matrix = np.eye(3, dtype=np.float32)
    if primaries in GAMUTS:
        matrix = gamut_matrix(GAMUTS[primaries]).astype(np.float32)

    out = np.empty(levels.shape, np.uint8)
    for start in range(0, len(levels), ROWS):
        rows = slice(start, start + ROWS)
        light = _signal_table(transfer)[levels[rows]]  # [rows w 3]
        if transfer == HLG:
            luminance = light @ BT2020_LUMINANCE
            display = light * luminance[..., None] ** np.float32(HLG_GAMMA - 1)  # OOTF
            light = _lookup(_compress_table(), display)
        out[rows] = _lookup(_sdr_table(), light @ matrix.T)
    return out
