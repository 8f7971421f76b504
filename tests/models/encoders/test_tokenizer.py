"""What tokenizers cut is counted and logged once."""

import random

import pytest

from vdx.files import warn_once
from vdx.models.encoders.text import ByteTokenizer
from vdx.models.encoders.tokenizer import Tokenizer, report_cut


@pytest.fixture(autouse=True)
def nothing_logged():
    warn_once.cache_clear()


@pytest.mark.parametrize("seed", range(5))
def test_cut_captions_are_counted_with_the_longest(caplog, seed):
    rng = random.Random(seed)
    texts = ["é" * rng.randrange(1, 40) for _ in range(30)] + ["x" * 100]
    tokenizer = ByteTokenizer(32)
    for _ in range(2):
        report_cut("captions", texts, tokenizer)
    # Of a caption that is cut, what follows changes nothing.
    is_cut = [len(text.encode()) > 31 for text in texts]
    same = [(tokenizer(text)[0] == tokenizer(text + "y")[0]).all() for text in texts]
    assert all(a or not b for a, b in zip(same, is_cut, strict=True))
    cut = sum(is_cut)
    assert [record.message for record in caplog.records] == [
        f"{cut} of 31 captions are longer than the 31 bytes that the text encoder reads, and are "
        "cut; the longest has 100."
    ]


def test_captions_that_fit_are_silent(caplog):
    assert isinstance(ByteTokenizer(4), Tokenizer)
    report_cut("captions", ["abc", "é", "a"], ByteTokenizer(4))
    assert not caplog.records


def test_blank_captions_are_counted(caplog):
    report_cut("captions", ["", "a", " \n\u2028"], ByteTokenizer(8))
    assert [record.message for record in caplog.records] == [
        "2 of 3 captions are blank: they count as the empty text."
    ]
