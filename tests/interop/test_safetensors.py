"""The safetensors format: exchanged with its own library, and files that are refused."""

import numpy as np
import pytest

from tests.interop.small_weights import THEIRS, normal, save
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
    file.write_bytes(content[:-1])
    with pytest.raises(
        WeightsError,
        match=rf"has {len(content) - 1:,} bytes, and its header requires "
        rf"{len(content):,}\. Download it again",
    ):
        open_weights(file)


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
