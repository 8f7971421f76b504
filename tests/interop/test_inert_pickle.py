"""Pickles as data: plain values are those that were written, and nothing is called or changed."""

import collections
import os
import pickle

import numpy as np
import pytest

from tests.hostile.samples import Named, dump
from vdx.interop import inert_pickle
from vdx.interop.inert_pickle import MOST_BYTES, OPCODES, Call, Name, load

ORDERED = Name("collections", "OrderedDict")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_what_was_written(protocol):
    shared = {"a": [1, -1, 2**31, -(2**63), 1.5]}
    value = {
        "text": "größer 円 \U0001f600",
        "bytes" if protocol > 2 else "none": b"ab" if protocol > 2 else None,
        1: (True, False, None, (), (1,), (1, 2), (1, 2, 3), tuple(range(9))),
        "twice": [shared, shared],
        "ordered": collections.OrderedDict(x=1, y=[]),
        "many": list(range(3000)),
    }
    got = load(pickle.dumps(value, protocol), {ORDERED})
    assert got == value
    assert got["twice"][0] is got["twice"][1]


def test_calls_and_names_are_tuples():
    name = Name("torch", "f")
    content = dump(Named("torch", "f"))
    assert load(content, {name}) == name
    called = content[:-1] + b"K\x01\x85R."
    assert load(called, {name}) == Call(name, (1,))


def test_other_names_are_refused_before_they_mean_anything():
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    for protocol in (2, 4):
        with pytest.raises(ValueError, match=r"it names posix\.system, which no array needs"):
            load(pickle.dumps(Evil(), protocol), {ORDERED})


GLOBAL = b"\x80\x02ctorch\nf\n"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (GLOBAL + b"}b.", "sets attributes of an object"),
        (GLOBAL + b"K\x01K\x02s.", "changes an object that is no dictionary"),
        (GLOBAL + b"K\x01a.", "changes an object that is no list"),
        (b"\x80\x02)K\x01a.", "changes an object that is no list"),
        (b"\x80\x02K\x01)R.", "calls what is no function"),
        (GLOBAL + b"}R.", "calls what is no function"),
        (
            b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
            "makes a dictionary from other objects",
        ),
        (b"\x80\x02})K\x01s.", "a key of a dictionary is neither a text nor a number"),
        (b"\x80\x02}(K\x01NK\x01Nu.", "the key '1' stands twice"),
        (b"\x80\x02}(K\x01u.", "changes an object that is no dictionary"),  # a key alone
        (b"\x80\x02}(K\x01Nu(NNu.", None),
        (b"\x80\x02NN.", "does not end with one value"),
        (b"\x80\x02.", "does not end with one value"),
        (b"\x80\x02\x85.", "its stack is empty"),
        (b"\x80\x02N", "pickle exhausted before seeing STOP"),
        (b"\x80\x02\x82\x01.", "the opcode EXT1"),
        (b"\x80\x02N2.", "the opcode DUP"),
        (b"I1\n.", "the opcode INT"),
    ],
)
def test_programs_that_are_refused(program, reason):
    if reason is None:  # a dictionary may be filled in several steps
        assert load(program, {Name("torch", "f"), ORDERED}) == {1: None, None: None}
        return
    with pytest.raises(ValueError, match=reason):
        load(program, {Name("torch", "f"), ORDERED})


def test_programs_beyond_the_bounds(monkeypatch):
    with pytest.raises(ValueError, match="more than 33,554,432 bytes"):
        load(bytes(MOST_BYTES + 1), ())
    monkeypatch.setattr(inert_pickle, "MOST_OPCODES", 2000)
    assert load(b"\x80\x02" + b"N0" * 998 + b"N.", ()) is None
    with pytest.raises(ValueError, match="more than 2,000 opcodes"):
        load(b"\x80\x02" + b"N0" * 999 + b"N.", ())


def test_random_programs_end_and_change_nothing():
    rng = np.random.default_rng(0)
    codes = [getattr(pickle, name) for name in OPCODES if hasattr(pickle, name)]
    before = np.dtype("float32").str
    for _ in range(400):
        chosen = rng.integers(len(codes), size=rng.integers(1, 60))
        program = b"".join(codes[i] + rng.bytes(int(rng.integers(3))) for i in chosen)
        try:
            load(GLOBAL + program + b".", {Name("torch", "f")})
        except Exception as error:
            assert not isinstance(error, RecursionError | MemoryError)
    assert np.dtype("float32").str == before
