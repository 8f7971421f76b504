"""Trained text encoders: no padding is read, every byte counts, words and n-grams are divided."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.conditioning.test_conditioning import BYTES, LENGTH, TOKENIZE, captions
from vdx.models.encoders.text import ENCODERS, ngram_hashes, word_index
from vdx.models.shapes import init_shapes

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request, randomise):
    """Jitted function of ids [b LENGTH or 8] and mask for every trained encoder, made small."""
    small = {"bytes": {k: v for k, v in BYTES.items() if k not in ("name", "length")}}
    make = lambda length: ENCODERS[request.param](length=length, **small[request.param])
    ids = jnp.zeros((1, LENGTH), jnp.int32)
    params = randomise(init_shapes(make(LENGTH), ids, ids == 0))
    return jax.jit(lambda ids, mask: make(ids.shape[1]).apply({"params": params}, ids, mask))


def test_features_do_not_depend_on_padding(encoder):
    run = encoder
    batch = captions("a red", "blue ball moves")
    x, mask = run(batch["text"], batch["text_mask"])
    spoilt = np.where(batch["text_mask"], batch["text"], 77)  # ids under the mask are unread
    np.testing.assert_array_equal(run(spoilt, batch["text_mask"])[0], x)
    got, short_mask = run(batch["text"][:1, :8], batch["text_mask"][:1, :8])  # 6 bytes fit into 8
    np.testing.assert_array_equal(short_mask[0], mask[0])
    np.testing.assert_allclose(got[0, :2], x[0, :2], atol=1e-5)
    assert not mask[0, 2:].any()


def test_every_byte_counts(encoder):
    texts = ["a red ball", "b red ball", "a rad ball", "a red balk", "a red bal"]
    batch = captions(*texts)
    x, mask = encoder(batch["text"], batch["text_mask"])
    x = np.where(mask[..., None], x, 0)
    assert all(np.abs(row - x[0]).max() > 1e-3 for row in x[1:])


def test_words_end_at_spaces_and_after_twelve_bytes():
    text = "a red " + "x" * 30 + " ball"
    data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)[None] + 3
    got = np.asarray(word_index(data))[0]
    parts = [
        "".join(c for c, w in zip(text, got, strict=True) if w == i) for i in range(got.max() + 1)
    ]
    assert parts == ["a ", "red ", "x" * 12, "x" * 12, "x" * 6 + " ", "ball"]


@pytest.mark.parametrize("n", [1, 3, 5])
def test_equal_ngrams_have_equal_hashes_and_others_do_not(n):
    ids = RNG.integers(3, 6, (4, 40)).astype(np.int32)  # few letters: many repeats
    hashes = np.asarray(ngram_hashes(ids, n))
    assert hashes.min() >= 0
    padded = np.pad(ids, ((0, 0), (n - 1, 0)))
    grams = np.lib.stride_tricks.sliding_window_view(padded, n, axis=1).reshape(-1, n)
    same = (grams[:, None] == grams).all(-1)
    np.testing.assert_array_equal(hashes.reshape(-1)[:, None] == hashes.reshape(-1), same)


def test_bytes_are_cut_with_the_end_token_kept():
    for text in ("", "abc", "x" * (LENGTH - 1), "x" * LENGTH, "é" * LENGTH):
        data = text.encode()[: LENGTH - 1]
        ids, mask = TOKENIZE(text)
        assert ids.dtype == np.int32 and mask.dtype == bool and len(ids) == len(mask) == LENGTH
        want = [b + 3 for b in data] + [1]  # ByT5: 0 padding, 1 end
        assert ids.tolist() == want + [0] * (LENGTH - len(want))
        assert mask.sum() == len(want)


def test_special_tokens_in_a_caption_are_bytes():
    ids, mask = TOKENIZE("a </s> b")
    assert ids[: mask.sum()].tolist() == [byte + 3 for byte in b"a </s> b"] + [1]


def test_a_million_characters_take_bounded_time():
    text = "\U0001f600" * 1_000_000
    begin = time.process_time()
    assert TOKENIZE.count(text) == 4_000_000 and TOKENIZE(text)[1].all()
    assert time.process_time() - begin < 1


def test_the_default_reads_captions_of_255_bytes():
    tokenizer = ENCODERS["bytes"]().tokenizer()
    first, second = (tokenizer("x" * 254 + end)[0] for end in "ab")
    assert tokenizer.kept == 255 and not np.array_equal(first, second)
