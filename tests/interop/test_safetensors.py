"""The safetensors format: exchanged with its own library, and files that are refused."""

import json
import os

import numpy as np
import pytest

from tests.interop.small_weights import THEIRS, normal, save
from vdx.files import FileError
from vdx.interop.keymap import WeightsError
from vdx.interop.load import open_weights
from vdx.interop.safetensors import DTYPES, read_header, write


def test_their_library_reads_ours_and_we_read_theirs(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    arrays = {name: (4 * normal(3, 5)).astype(dtype) for name, dtype in DTYPES.items()}
    arrays |= {"scalar": np.float32(3).reshape(()), "empty": np.zeros((0, 4), np.float16)}
    got = safetensors.load_file(save(tmp_path / "ours.safetensors", arrays))
    assert got.keys() == arrays.keys()
    safetensors.save_file(got, tmp_path / "theirs.safetensors")
    theirs = read_header(tmp_path / "theirs.safetensors")
    ours = read_header(tmp_path / "ours.safetensors")
    for name, want in arrays.items():
        assert got[name].shape == want.shape
        for stored in (ours[name], theirs[name]):
            assert stored.dtype == want.dtype and stored.offset % want.itemsize == 0
            assert stored.read().tobytes() == want.tobytes() and stored.read().shape == want.shape


def test_arrays_come_in_any_order_and_a_failed_write_leaves_nothing(tmp_path):
    plan = {k: (v.shape, v.dtype) for k, v in THEIRS.items()}
    write(tmp_path / "a.safetensors", plan, reversed(THEIRS.items()))
    for key, stored in read_header(tmp_path / "a.safetensors").items():
        np.testing.assert_array_equal(stored.read(), THEIRS[key])
    with pytest.raises(AssertionError):
        write(tmp_path / "b.safetensors", plan, list(THEIRS.items())[:-1])
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_that_is_cut_off(tmp_path, keep):
    file = save(tmp_path / "model.safetensors", THEIRS)
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    with pytest.raises(WeightsError, match=r"model.safetensors is (cut off|not a safetensors)"):
        open_weights(file)
    file.write_bytes(content[:50])  # in the middle of the header
    with pytest.raises(WeightsError, match=r"model.safetensors is cut off: it has 50 bytes"):
        open_weights(file)
    file.write_bytes(content[:-1])
    with pytest.raises(
        WeightsError,
        match=rf"has {len(content) - 1:,} bytes, and its header requires "
        rf"{len(content):,}\. Download it again",
    ):
        open_weights(file)


@pytest.mark.parametrize("content", [b"", b"\0", bytes(7), b"\xff" * 7])
def test_a_file_without_room_for_the_length_of_a_header(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="does not begin with the length of a header"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"<html>404 Not Found</html>",
        b"\x04\0\0\0\0\0\0\0[1]  ",
        b"\x02\0\0\0\0\0\0\0\xff\xff",
        b'\x3d\0\0\0\0\0\0\0{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}    ',
        b'\x3d\0\0\0\0\0\0\0{"a": {"dtype": "Q32", "shape": [2], "data_offsets": [0, 8]}}    ',
        b'\x3d\0\0\0\0\0\0\0{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8,0]}}    ',
    ],
)
def test_a_file_of_another_kind(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(header + bytes(50))
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        open_weights(tmp_path)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry(), "b": entry()}, "'[ab]' does not begin where the array before it ends"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "'b' does not begin where"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, "'b' does not begin where"),
        ({"a": entry(offsets=(8, 16))}, "'a' does not begin where"),
        ({"a": entry()}, "8 more than its header requires"),
        ({"a": entry(), "b": entry(shape=(4,), offsets=(8, 24))}, "is cut off"),
        ({"a": entry(shape=(3,))}, "'a' of 12 bytes does not fill 0 to 8"),
        ({"a": entry(shape=(1,))}, "'a' of 4 bytes does not fill 0 to 8"),
        ({"a": entry(offsets=(0, 4)) | {"shape": ""}}, "'a' has no lists of its sizes"),
        ({"a": entry(offsets=(0, 4)) | {"shape": {}}}, "'a' has no lists of its sizes"),
        ({"a": entry(shape=(-2,))}, "no shape of an array"),
        ({"a": entry(shape=(True, 2))}, "no shape of an array"),
        ({"a": entry(shape=(2.0,))}, "no shape of an array"),
        ({"a": entry(shape=(0, 2**62), offsets=(0, 0))}, "no shape of an array"),
        ({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}, "shape is too large"),
        ({"a": entry(shape=[1] * 33)}, "no shape of an array"),
        ({"a": entry(dtype="F128")}, "'a' has the type 'F128', which is not known"),
        ({"a": entry(dtype=["F32"])}, "unhashable"),
        ({"a": entry(offsets=(0,))}, "not two integers"),
        ({"a": entry(offsets=(0.0, 8.0))}, "not two integers"),
        ({"a": entry(offsets=(False, 8))}, "not two integers"),
        ({"a": entry(offsets=(-8, 0))}, "'a' of 8 bytes does not fill -8 to 0"),
        ({"a": entry() | {"strides": [1]}}, "'a' has no dtype, shape and data_offsets, or more"),
        ({"a": {"dtype": "F32"}}, "'a' has no dtype, shape and data_offsets"),
        ({"a": [1]}, "'a' has no dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, "metadata are no texts"),
        ({"__metadata__": ["a"]}, "metadata are no texts"),
        ([entry()], "its header is no object"),
        ('{"a": 1, "a": 2}', "the name 'a' stands twice"),
        ("[" * 10**5, "nested more than 64 deep"),
    ],
)
def test_headers_that_are_refused(header, reason, tmp_path):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(WeightsError, match=rf"x\.safetensors .*{reason}"):
        read_header(path)


def test_a_header_beyond_the_bound_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((2**25 + 1).to_bytes(8, "little"))
        file.truncate(2**26)
    with pytest.raises(WeightsError, match="does not begin with the length of a header"):
        read_header(path)


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    for path in (tmp_path / "x.safetensors", tmp_path):
        with pytest.raises(FileError, match=r"x\.safetensors is a pipe"):
            open_weights(path)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "a\0b", "..", "", 3, None])
def test_an_index_that_names_no_file_in_its_folder(name, tmp_path):
    save(tmp_path / "a.safetensors", THEIRS)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(WeightsError, match=r"index\.json has no weight_map that names files in"):
        open_weights(tmp_path)
