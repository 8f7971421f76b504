"""The figures that the thresholds of configs/prepare.py reach on footage with planted faults.

The thresholds were set on seed 0 and on other photographs. `python -m benchmarks.curation_faults`
prints more.
"""

import importlib.util

import pytest

from tests.data.fault_figures import decided, figures, lowest_overlap, speed_error
from tests.data.planted_faults import photographs

# reason -> least precision, least recall
BOUNDS = {
    "low_resolution": (0.75, 0.65),
    "compression": (0.85, 0.75),
    "shake": (0.9, 0.9),
    "static": (0.9, 0.9),
    "borders": (0.9, 0.85),
    "blank": (0.95, 0.95),
}
TEXT_BOUNDS = {"watermark": (0.85, 0.6), "text": (0.85, 0.6)}
NO_PHOTOGRAPHS = importlib.util.find_spec("skimage") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NO_PHOTOGRAPHS, reason="scikit-image has the photographs"),
]


@pytest.fixture(scope="module", params=[0, 1])
def clips(request):
    return list(decided(request.param, photographs()))


@pytest.mark.parametrize("reason", BOUNDS)
def test_precision_and_recall(clips, reason):
    found = figures(clips, reason)
    assert found.precision >= BOUNDS[reason][0], found.wrong
    assert found.recall >= BOUNDS[reason][1], found.wrong


def test_most_clean_clips_are_kept(clips):
    clean = [clip.row["verdict"] == "keep" for clip in clips if not clip.planted.faults]
    assert sum(clean) >= 0.85 * len(clean)


def test_crop_boxes_and_camera_speeds(clips):
    assert lowest_overlap(clips) >= 0.95
    assert speed_error(clips) <= 0.15


def test_text_is_found_by_the_reader():
    pytest.importorskip("rapidocr", reason="the extra `text` is not installed")
    kinds = ("watermark", "subtitle", "pan", "tripod")
    clips = list(decided(0, photographs(), text=True, kinds=kinds))
    for reason, (precision, recall) in TEXT_BOUNDS.items():
        found = figures(clips, reason)
        assert found.precision >= precision, found.wrong
        assert found.recall >= recall, found.wrong
