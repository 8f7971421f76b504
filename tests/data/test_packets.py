"""Times of frames: edit lists, and cuts of containers that store only decoding times."""

from fractions import Fraction

import numpy as np
import pytest

from vdx.data.mp4_boxes import Edit, Track
from vdx.data.packets import NO_TIME, Packets, apply_edits, display_times

TICK = Fraction(1, 100)


def on_screen(ticks, edits):
    """Return (frame, time) of what is shown, each time that it changes, tick by tick."""
    shown, now = [], 0
    for edit in edits:
        last = None
        for tick in range(round(edit.duration / TICK)):
            if edit.media_time < 0:
                break
            frame = max(sum(t <= edit.media_time + tick for t in ticks) - 1, 0)
            if frame != last and ticks[frame] < edit.media_time + round(edit.duration / TICK):
                shown.append((frame, now + max(tick, ticks[frame] - edit.media_time)))
            last = frame
        now += round(edit.duration / TICK)
    return shown


@pytest.mark.parametrize("seed", range(20))
def test_edits_show_what_is_on_the_screen(seed):
    rng = np.random.default_rng(seed)
    ticks = np.cumsum(rng.integers(1, 9, 30)) - 5 * (seed % 2)
    edits = tuple(
        Edit(Fraction(int(rng.integers(1, 60)), 100), int(rng.integers(-1, ticks[-1])))
        for _ in range(4)
    )
    expected = on_screen(ticks.tolist(), edits)
    shown = apply_edits((*edits, Edit(Fraction(1, 20), int(ticks[4]))), ticks, TICK)
    count = len(expected)
    assert list(zip(shown.frames.tolist(), shown.ticks.tolist(), strict=True))[:count] == expected
    assert shown.frames[count] == 4 and (np.diff(shown.ticks) > 0).all()


def test_the_last_edit_may_go_to_the_end_and_none_shows_all():
    ticks = np.arange(0, 50, 5)
    shown = apply_edits((Edit(Fraction(0), 20),), ticks, TICK)
    assert shown.frames.tolist() == [4, 5, 6, 7, 8, 9] and shown.ticks.tolist() == [
        *range(0, 30, 5)
    ]
    np.testing.assert_array_equal(apply_edits((), ticks, TICK).ticks, ticks)
    with pytest.raises(ValueError, match="its edit list shows none"):
        apply_edits((Edit(Fraction(1), -1),), ticks, TICK)


def test_an_edit_list_of_endless_frames_is_refused():
    edits = (Edit(Fraction(10**6), 0),) * 3000
    with pytest.raises(ValueError, match="an edit list of more than 2097152 frames"):
        apply_edits(edits, np.arange(1000), TICK)


def packets(shown_at, decoded_at):
    count = len(decoded_at)
    durations = np.ones(count, int)
    is_key = np.arange(count) == 0
    track = Track((), None)
    times = np.array(shown_at), np.array(decoded_at)
    return Packets(*times, durations, is_key, TICK, shown_as_stamped=False, track=track)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([0, 2, 3, 1, 5, 6, 4, 7], [0, 10, 20, 30, 40, 50, 60, 70]),  # nothing is lost
        ([0, 4, 5, 3, 7, 6], [20, 30, 40, 50, 60, 70]),  # 1, 2 are shown before 0, and lost
        ([5, 7, 6], [50, 60, 70]),  # complete only from 5 on
        ([0, 2, 3], [0, 20, 30]),  # 1 is prepared for 2, and never shown
    ],
)
def test_frames_are_shown_at_the_rate_at_which_they_are_decoded(order, expected):
    decoded_at = np.arange(0, 80, 10)
    shown_at = decoded_at if order == sorted(order) else np.full(8, NO_TIME)
    got = display_times(packets(shown_at, decoded_at), np.array(order))
    assert got.tolist() == expected
