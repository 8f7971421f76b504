"""Clips with pixels that are NaN or infinite are refused; nothing of them is written."""

import numpy as np
import pytest

from vdx.generate.clip import iter_uint8_frames, write_stream
from vdx.generate.request import Request
from vdx.generate.sample_grid import draw_sample_grid
from vdx.generate.video_io import NotFinite

REQUEST = Request(prompts=("a cat",), seed=2**64 - 1, num_frames=4, fps=8.0, sampling={})


def pieces(bad: float | None):
    """Return two pieces of a clip, of which the second may hold one bad number."""
    clip = np.zeros((2, 2, 8, 8, 3), np.float32)
    if bad is not None:
        clip[1, 1, 4, 4, 1] = bad
    return iter(clip)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_clip_that_is_not_finite_is_refused(tmp_path, bad):
    out = tmp_path / "out.mp4"
    with pytest.raises(NotFinite, match="NaN or infinite"):
        write_stream([pieces(bad)], REQUEST, None, out)
    assert list(tmp_path.iterdir()) == []


def test_a_finite_one_is_written(tmp_path):
    write_stream([pieces(None)], REQUEST, None, tmp_path / "out.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {"out.mp4", "out.json"}


def test_a_sample_grid_that_is_not_finite_does_not_end_the_training(tmp_path, caplog):
    def draw():
        return list(iter_uint8_frames(pieces(np.nan)))

    draw_sample_grid(draw, tmp_path / "samples")
    assert "NaN or infinite" in caplog.text and not (tmp_path / "samples").exists()


def test_seeds_go_around_after_the_largest():
    request = Request(prompts=("a", "b", "c"), seed=2**64 - 2, num_frames=1, fps=8.0, sampling={})
    assert request.seeds == [2**64 - 2, 2**64 - 1, 0]
