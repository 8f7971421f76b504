"""Blocks of frames: which frames each attends to, and where its keys are cached."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from vdx.models.mixers.block_causal import BlockLayout, attend_by_block, visible_in_cache
from vdx.models.mixers.context import CachePosition

LAYOUTS = [
    BlockLayout(2),
    BlockLayout(2, window=1),
    BlockLayout(1, window=2, sink=1),
    BlockLayout(3, window=2, sink=2),
]
FRAMES = 11  # the last block is shorter in all layouts but those of one frame


def attends(layout: BlockLayout, query: int, key: int) -> bool:
    """The definition, frame by frame."""
    query, key = query // layout.size, key // layout.size
    if key > query:
        return False
    if layout.window is None:
        return True
    return key >= query - layout.window or key < layout.sink


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mask_is_its_definition(layout):
    mask = layout.mask(FRAMES)
    for q, s in itertools.product(range(FRAMES), repeat=2):
        assert mask[q, s] == attends(layout, q, s), (q, s)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_cover_the_clip_once(layout):
    blocks = layout.blocks(FRAMES)
    assert [frame for start, stop in blocks for frame in range(start, stop)] == [*range(FRAMES)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_visible_pairs_are_counted(layout):
    assert layout.num_visible(FRAMES) == layout.mask(FRAMES).sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cache_holds_the_visible_blocks(layout):
    """Block by block, what is in the cache and visible is what the block attends to."""
    blocks = 7
    frames = blocks * layout.size
    past = CachePosition(jnp.int32(0), blocks)
    cache = np.full(layout.cached_blocks(past) * layout.size, -1)  # the frame in each place
    for index in range(blocks):
        start = index * layout.size
        past = CachePosition(jnp.int32(start), blocks)
        current = np.arange(start, start + layout.size)
        joined = np.concatenate([cache, current])
        visible = joined[np.asarray(visible_in_cache(layout, past, len(joined)))]
        want = np.flatnonzero(layout.mask(frames)[start])
        np.testing.assert_array_equal(np.sort(visible), want)

        place = int(layout.cache_slot(jnp.int32(index))) * layout.size
        cache[place : place + layout.size] = current


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_by_block_is_that_of_visible_frames(layout):
    """With an attention that averages its values, each frame is the mean of those it attends to."""
    values = jnp.arange(FRAMES, dtype=jnp.float32).reshape(1, FRAMES, 1, 1, 1, 1)

    def average(q, k, v):
        return jnp.broadcast_to(v.mean(1, keepdims=True), q.shape)

    got = attend_by_block(average, layout, values, values, values)
    mask = layout.mask(FRAMES)
    want = (mask @ np.arange(FRAMES)) / mask.sum(1)
    np.testing.assert_allclose(got.ravel(), want, rtol=1e-6)
