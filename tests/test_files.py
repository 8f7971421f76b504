"""Only regular files are opened, and none is read beyond its bound."""

import codecs
import io
import json
import math
import os
import socket

import numpy as np
import pytest

from vdx import files
from vdx.files import (
    FileError,
    append_rows,
    check_regular_file,
    file_stamp,
    open_regular,
    parse_json,
    read_bounded,
    read_json,
    read_json_object,
    read_npy,
    read_rows,
)


@pytest.fixture
def make(tmp_path):
    """make(kind): the path of something that is no regular file."""
    with socket.socket(socket.AF_UNIX) as listener:

        def one(kind):
            path = tmp_path / kind
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            elif kind == "socket":
                listener.bind(str(path))
            else:
                path.symlink_to("/dev/zero")
            return path

        yield one


@pytest.mark.parametrize("read", [check_regular_file, open_regular, lambda p: read_bounded(p, 9)])
@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device"])
def test_only_regular_files_are_opened(kind, read, make):
    path = make(kind)
    with pytest.raises(FileError, match=f"{path.name} is a {kind}; only regular files"):
        read(path)


def test_a_regular_file_is_read_through_links_and_to_its_bound(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert check_regular_file(tmp_path / "link") == 5
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"12345"
    assert read_bounded(tmp_path / "link", 5) == b"12345"
    with pytest.raises(FileError, match="file is longer than 4 bytes"):
        read_bounded(tmp_path / "file", 4)
    assert read_bounded(tmp_path / "file", 1 << 60) == b"12345"  # reserves no more than it reads


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_that_becomes_another_kind_between_check_and_opening(kind, make, monkeypatch):
    """Without waiting for somebody who writes into the pipe."""
    path = make(kind)
    monkeypatch.setattr(files, "check_regular_file", lambda path: 0)
    with pytest.raises(FileError, match=f"{path.name} is a {kind}; only regular files"):
        open_regular(path)


def test_a_file_that_grows_is_read_to_its_bound_and_no_further(monkeypatch):
    class Endless(io.BytesIO):
        left = 3

        def read(self, size):
            self.left -= 1
            assert self.left >= 0
            return bytes(size)

    monkeypatch.setattr(files, "open_regular", lambda path: Endless())
    with pytest.raises(FileError, match=r"log is longer than 2,000,000 bytes"):
        read_bounded("log", 2_000_000)


def test_a_stamp_is_of_the_file_that_a_name_leads_to(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert file_stamp(tmp_path / "a") == file_stamp(tmp_path / "link")
    assert file_stamp(tmp_path / "a") == (5, (tmp_path / "a").stat().st_mtime_ns)
    assert file_stamp(tmp_path / "absent") is None and file_stamp("a\0b") is None


def test_names_that_no_file_can_have(tmp_path):
    with pytest.raises(FileError, match=r"'a\\x00b' cannot be the name"):
        open_regular("a\0b")
    with pytest.raises(FileNotFoundError, match="absent"):
        open_regular(tmp_path / "absent")


def short(value):
    """Return the name of a case: a file may have megabytes."""
    return repr(value)[:40]


# JSON


def draw_value(rng, levels=4):
    """A random JSON value."""
    kind = rng.integers(7 if levels else 5)
    if kind == 5:
        return [draw_value(rng, levels - 1) for _ in range(rng.integers(4))]
    if kind == 6:
        names = [draw_text(rng) for _ in range(rng.integers(4))]
        return {name: draw_value(rng, levels - 1) for name in names}
    draws = [
        None,
        bool(rng.integers(2)),
        int(rng.integers(-(2**63), 2**63 - 1)) + 2**63 * int(rng.integers(2)),
        float(rng.normal() * 10.0 ** rng.integers(-300, 300)),
        draw_text(rng),
    ]
    return draws[kind]


def draw_text(rng):
    """A short text of any characters but halves of surrogate pairs."""
    points = rng.choice([rng.integers(0, 128, 5), rng.integers(0xE000, 0x110000, 5)])
    return "".join(map(chr, points[: rng.integers(6)]))


def test_json_is_what_was_written():
    rng = np.random.default_rng(0)
    for _ in range(300):
        value = draw_value(rng)
        text = json.dumps(value, ensure_ascii=bool(rng.integers(2)))
        assert parse_json(text, "x") == value
        assert parse_json(codecs.BOM_UTF8 + text.encode(), "x") == value


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the name 'c' stands twice in one object"),
        (b'{"\\u001b": 1, "\\u001b": 2}', r"the name '\\x1b' stands twice"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        (b"[" * 10**6, "nested more than 64 deep"),
        (b'{"a":' * 10**5, "nested more than 64 deep"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "the number '1e999' is too large"),
        (b"[18446744073709551616]", "the integer 18446744073709551616... has more than 64 bits"),
        (b"9" * 10**6, "has more than 64 bits"),
        (b'"\xff"', "is not UTF-8 text: byte 1 fits nothing"),
        ("{}".encode("utf-16"), "is not UTF-8 text: byte 0"),
        (b"[" + b"0," * 10**6 + b"0]", "more than 1,000,000 values"),
        (b'"' + b"a" * 2**25 + b'"', "longer than 33,554,432 bytes"),
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
    ],
    ids=short,
)
def test_json_that_is_refused(content, reason, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"file.json .*{reason}"):
        read_json(path)


def test_integers_of_any_size_are_floats_where_they_are_asked_for(tmp_path):
    path = tmp_path / "file.json"
    values = {"a": int(1e30), "b": [2**64 - 1, -(2**63), 0], "c": -(2**63) - 1}
    path.write_text(json.dumps(values))
    found = read_json_object(path, wide=True)
    assert found == {"a": 1e30, "b": [2**64 - 1, -(2**63), 0], "c": -(2.0**63)}
    assert isinstance(found["a"], float) and isinstance(found["b"][0], int)
    path.write_bytes(b'{"a": ' + b"9" * 10**6 + b"}")
    with pytest.raises(FileError, match=r"file.json .*the number '9+'\.\.\. is too large"):
        read_json_object(path, wide=True)


def test_a_json_object(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"a": [1]}')
    assert read_json_object(path) == {"a": [1]}
    for text, kind in [("[1]", "a list"), ("null", "null"), ('"x"', "a text"), ("1.5", "a number")]:
        path.write_text(text)
        with pytest.raises(FileError, match=f"file.json holds {kind}, expected a JSON object"):
            read_json_object(path)
    with pytest.raises(FileError, match=r"absent.json cannot be read as JSON"):
        read_json(tmp_path / "absent.json")


def test_rows_of_a_log_skip_half_lines_and_keep_numbers_that_are_not_finite(tmp_path):
    path = tmp_path / "log.jsonl"
    append_rows(path, [{"step": 1}, {"loss": math.inf}, [2]])
    with path.open("ab") as out:
        out.write(b"[" * 10**5 + b"\n\xff\n" + b'{"step": ' + b"9" * 5000 + b"}\n{")
    append_rows(path, [{"step": 2}])
    assert read_rows(path) == [{"step": 1}, {"loss": math.inf}, {"step": 2}]
    assert read_rows(tmp_path / "absent.jsonl") == []


def test_a_row_beyond_the_bound_is_skipped_with_all_of_its_line(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n' + " " * 20 + '{"b": 2}\n{"c": 3}')
    monkeypatch.setattr(files, "MOST_JSON_BYTES", 20)
    assert read_rows(path) == [{"a": 1}, {"c": 3}]


# Arrays


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "|u1", "<i8", ">i2", "|b1"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_an_npy_file_is_the_array_that_was_saved(shape, order, dtype, tmp_path):
    entries = np.random.default_rng(0).integers(0, 256, shape)
    want = np.asarray(entries.astype(dtype), order=order)
    np.save(tmp_path / "a.npy", want)
    got = read_npy(tmp_path / "a.npy")
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_array_equal(got, want)


def npy(shape="(3,)", dtype="'<f4'", content=bytes(12)):
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy(content=bytes(11)), "has 79 bytes, and its header requires 80: it is cut off"),
        (npy(content=bytes(24)), "or holds more than one array"),
        (npy(dtype="'|O'"), "holds entries of type 'object', expected numbers"),
        (npy(dtype="'<U3'"), "expected numbers"),
        (npy(dtype="[('a', '<f4')]"), "expected numbers"),
        (npy(dtype="('<f4', (2,))"), "expected numbers"),
        (npy(shape="(-3,)"), "no shape of an array"),
        (npy(shape="(True,)", content=bytes(4)), "no shape of an array"),
        (npy(shape="(1,) * 33"), "not a .npy file"),
        (npy(shape=f"({'1, ' * 33})", content=bytes(4)), "no shape of an array"),
        (npy(shape=f"({'9' * 40},)"), "no shape of an array"),
        (npy(shape=f"(0, {2**40}, {2**40})", content=b""), "shape is too large"),
        (npy(shape="(" * 2000), "not a .npy file"),
        (npy(shape="-" * 3000 + "1"), "not a .npy file"),
        (npy(shape=" " * 9000 + "(3,)"), "not a .npy file"),
        (b"PK\x03\x04" + bytes(99), "not a .npy file of one array"),
        (b"\x93NUMPY\x09\0" + bytes(99), "not a .npy file of one array"),
        (b"\x93NUMPY\x01", "not a .npy file of one array"),
        (b"", "not a .npy file of one array"),
    ],
    ids=short,
)
def test_an_npy_file_that_is_refused(content, reason, tmp_path):
    path = tmp_path / "file.npy"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"file.npy .*{reason}"):
        read_npy(path)
