"""Pieces of clips: the frames that training reads, in a row, of the nearest bucket."""

import io

import numpy as np
import pytest

from tests.kill_prepare import write_footage
from vdx.config.build import ConfigError
from vdx.data.preparation.clips import ClipSettings, ClipSpan, make_clips, read_clip
from vdx.data.preparation.pieces import LatentSettings, cut_pieces
from vdx.data.preparation.store import Store
from vdx.data.record import BadRecord
from vdx.data.transforms import ClipSampling, to_example
from vdx.data.video_files import video_record


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    """A clip of 30 frames of 96x128 at 12 a second."""
    root = tmp_path_factory.mktemp("pieces")
    write_footage(root, 1, frames=30)
    store = Store(root, "clips", ".npz")
    make_clips(root / "0.mp4", [ClipSpan("a", 0.0, 2.5, None)], ClipSettings(), store)
    return store.path("a").read_bytes()


def cut(clip: bytes, **settings):
    pieces = cut_pieces("a", clip, LatentSettings(**settings))
    found = list(pieces.pieces)
    assert len(found) == pieces.number
    return found


@pytest.mark.parametrize("fps", [12.0, 6.0, 8.0, 7.0])
def test_frames_are_those_of_training(clip, fps):
    first, *others = cut(clip, num_frames=5, height=32, width=48, fps=fps)
    video = read_clip(clip)["video"].tobytes()
    record = video_record("a", "", lambda: io.BytesIO(video))
    sampling = ClipSampling(num_frames=5, fps=fps, start="first")
    example = to_example(
        record,
        clip=sampling,
        height=32,
        width=48,
        tokenize=lambda caption: (np.zeros(1), np.ones(1)),
        num_frames=5,
        rng=np.random.default_rng(0),
    )
    np.testing.assert_array_equal(first.video, example["video"])
    assert 1 + len(others) == int(2.5 * fps) // 5


def test_pieces_follow_one_another(clip):
    """At the footage's own rate no frame is left out between two pieces, and none comes twice."""
    pieces = cut(clip, num_frames=9, height=96, width=128, fps=12.0)
    video = read_clip(clip)["video"].tobytes()
    record = video_record("a", "", lambda: io.BytesIO(video))
    np.testing.assert_array_equal(
        np.concatenate([piece.video for piece in pieces]), record.read(record.timestamps[:27])
    )
    np.testing.assert_allclose([piece.start for piece in pieces], [0, 0.75, 1.5], atol=1e-3)


def test_a_clip_has_the_longest_length_and_the_nearest_shape_that_it_fills(clip):
    lengths = {piece.video.shape for piece in cut(clip, num_frames=(5, 9, 33), height=32, width=48,
                                                  fps=12.0)}  # fmt: skip
    assert lengths == {(9, 32, 48, 3)}
    buckets = ((9, 48, 32), (9, 48, 64), (9, 192, 256))
    assert cut(clip, buckets=buckets, fps=12.0)[0].video.shape == (9, 48, 64, 3)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_frames": 33}, "too short: 30 frames at 12 a second, the shortest piece has 33"),
        ({"height": 128}, "too small: 96x128 would be enlarged to 128x48"),
        ({"buckets": ((5, 128, 48), (9, 192, 256))}, "too small: .* enlarged to 128x48, 192x256"),
        ({"fps": 24.0}, "too slow: needs 24 frames per second"),
    ],
)
def test_a_clip_that_fills_nothing_is_refused_with_the_reason(clip, settings, reason):
    with pytest.raises(BadRecord, match=reason):
        cut(clip, **{"num_frames": 5, "height": 32, "width": 48, "fps": 12.0, **settings})


@pytest.mark.parametrize("settings", [{"num_frames": ()}, {"fps": 0.0}, {"buckets": ((9, 32),)}])
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match=r"config\.latents"):
        LatentSettings(**settings)
