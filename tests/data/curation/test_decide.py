"""Verdicts from measures alone: every second in one row, every reason, and the explanation."""

import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from vdx.config.build import ConfigError
from vdx.config.loader import override, parse_value
from vdx.data.curation.caption import Caption
from vdx.data.curation.decide import DecideSettings, decide
from vdx.data.curation.explain import explain
from vdx.data.curation.table import MEASURES

THRESHOLDS = {"static": {"block_change": 2.0}, "blank": {"contrast": 4.0}}
SETTINGS = DecideSettings(THRESHOLDS, min_seconds=1.0, max_seconds=4.0, cut_score=0.0)
CAPTIONS = {"a": Caption("a dog")}


def look(seconds, cuts=(), damage=(), boxes=(), **measures):
    """Return a look of cells of half a second; a measure is a number, or one for each cell."""
    starts = np.arange(0, seconds, 0.5)
    usual = dict.fromkeys(MEASURES, 50.0) | measures
    cells = {name: np.broadcast_to(value, starts.shape).tolist() for name, value in usual.items()}
    cells |= {"start": starts.tolist(), "end": np.minimum(starts + 0.5, seconds).tolist()}
    source = {"verdict": "ok", "reasons": [], "duration": seconds, "width": 64, "height": 48}
    return {"source": source, "cells": cells, "cuts": list(cuts), "damage": damage, "box": boxes}


def hard(time, score=1.0):
    return {"time": time, "kind": "hard", "start": time, "end": time, "score": score}


def gradual(start, end):
    return {"time": (start + end) / 2, "kind": "gradual", "start": start, "end": end, "score": 1.0}


def decide_one(*args, settings=SETTINGS, captions=CAPTIONS, **kwargs):
    return decide({"a": look(*args, **kwargs)}, captions, settings)


@pytest.mark.parametrize("seed", range(10))
def test_every_second_is_in_exactly_one_row(seed):
    rng = np.random.default_rng(seed)
    duration = float(rng.uniform(0.3, 40))
    times = np.sort(rng.uniform(0, duration * 1.1, 2 * rng.integers(0, 6)))
    cuts = [hard(t) for t in times[::2]]
    if len(times) > 2:
        cuts.append(gradual(*times[1:3]))
    damage = [[duration / 2, duration / 2 + 1]] * int(rng.integers(0, 2))
    rows = decide_one(duration, cuts, damage)
    edges = [0.0] + [row["end"] for row in rows]
    assert [row["start"] for row in rows] == edges[:-1]
    assert edges[-1] == duration
    for row in rows:
        seconds = row["end"] - row["start"]
        assert 0 < seconds <= SETTINGS.max_seconds + 1e-6 or "too_short" in row["reasons"]
        if seconds < SETTINGS.min_seconds - 1e-6:
            assert "too_short" in row["reasons"]


def test_shots_are_between_cuts_and_long_ones_are_split_evenly():
    cuts = [hard(2.0), gradual(4.0, 5.0), hard(0.3, score=0.1)]
    assert decide_one(12.0, cuts)[0]["end"] == 0.3
    rows = decide_one(12.0, cuts, settings=DecideSettings(THRESHOLDS, 1.0, 4.0, cut_score=0.5))
    spans = [(row["start"], row["end"]) for row in rows]
    assert spans == [(0, 2), (2, 4), (4, 5), (5, 8.5), (8.5, 12)]
    assert [row["verdict"] for row in rows] == ["keep", "keep", "drop", "keep", "keep"]
    assert rows[2]["reasons"] == ["too_short"]


def test_a_clip_has_every_reason_and_every_measure():
    (row,) = decide_one(0.5, contrast=1.0, block_change=0.0, captions={})
    assert set(row["reasons"]) == {"static", "blank", "too_short", "caption_missing"}
    assert row["measures"]["brightness"] == 50
    (row,) = decide_one(2.0, captions={"a": Caption(" ")})
    assert row["reasons"] == ["caption_empty"]


def test_cells_at_a_cut_belong_to_no_clip():
    # Both clips are static; the cells at the cut, and the one that looks back, see a change.
    change = [0, 0, 0, 0, 90, 90, 0, 0]
    rows = decide_one(4.0, [hard(2.2)], block_change=change)
    assert [row["reasons"] for row in rows] == [["static"], ["static"]]


def test_unknown_measures_give_no_reason():
    (row,) = decide_one(2.0, block_change=None)
    assert row["verdict"] == "keep" and row["measures"]["block_change"] is None


def test_the_box_of_most_cells_is_the_crop():
    box = [0, 8, 64, 32]
    assert decide_one(2.0, boxes=[None, box, box, box])[0]["crop"] == box
    assert decide_one(2.0, boxes=[box, None, None, None])[0]["crop"] is None
    assert decide_one(2.0, boxes=[[0, 0, 64, 48]] * 4)[0]["crop"] is None


def test_captions_by_time_are_those_of_the_clip():
    captions = {"a": Caption(cues=((0, 2, "one"), (2, 4, "two")))}
    rows = decide_one(4.0, [hard(2.0)], captions=captions)
    assert [row["caption"] for row in rows] == ["one", "two"]


def test_the_explanation_says_what_would_keep_how_much():
    rng = np.random.default_rng(0)
    changes = rng.uniform(0, 3, 30)
    looks = {str(i): look(2.0, block_change=change) for i, change in enumerate(changes)}
    captions = {name: Caption("x") for name in looks}
    rows = decide(looks, captions, SETTINGS)
    before = sum(row["verdict"] == "keep" for row in rows)
    text = explain(rows, SETTINGS)
    found = re.findall(r"--config\.(decide\.\S+)=(\S+) keeps (\S+) s more", text)
    assert len(found) == 2
    dropped = 2.0 * (len(rows) - before)
    assert dropped / 2 <= float(found[0][2]) < dropped / 2 + 2.0  # seconds of one clip
    assert float(found[1][2]) == dropped
    for key, value, seconds in found:
        config = ConfigDict({"decide": {"thresholds": THRESHOLDS}})
        override(config, key, parse_value(value))
        changed = DecideSettings(config.decide.thresholds.to_dict(), 1.0, 4.0)
        kept = sum(row["verdict"] == "keep" for row in decide(looks, captions, changed))
        assert 2.0 * (kept - before) == pytest.approx(float(seconds))
        assert kept > before


def test_what_is_mostly_kept_needs_no_explanation():
    assert "alone" not in explain(decide_one(4.0), SETTINGS)


@pytest.mark.parametrize(
    "thresholds",
    [{"statik": {}}, {"static": {"contrast": 1.0}}, {"static": {"block_change": "low"}}],
)
def test_unknown_thresholds_are_refused(thresholds):
    with pytest.raises(ConfigError, match="thresholds"):
        DecideSettings(thresholds)
