"""PyTorch's files without torch: every array is read, and no code in them is run."""

import collections
import io
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.hostile import samples
from vdx.files import FileError
from vdx.interop import pth
from vdx.interop.keymap import WeightsError
from vdx.interop.pth import read_pth


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def test_a_pth_file_is_what_was_saved(torch, tmp_path):
    big = torch.arange(24.0).reshape(4, 6)
    content = {
        "float": torch.randn(3, 4),
        "bf16": torch.randn(5).to(torch.bfloat16),
        "half": torch.randn(2, 2).half(),
        "long": torch.arange(3),
        "bool": torch.tensor([True]),
        "transposed": big.T,
        "part": big[1:3, ::2],
        "same": big,
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    layer = torch.nn.Linear(3, 2)  # an OrderedDict with attributes
    torch.save(
        {"step": 3, "name": "x", "model": content, "ema": layer.state_dict()}, tmp_path / "w.pth"
    )
    got = read_pth(tmp_path / "w.pth")
    want = {f"model.{k}": v for k, v in content.items()}
    want |= {f"ema.{k}": v for k, v in layer.state_dict().items()}
    assert got.keys() == want.keys()
    for name in ("model.same", "model.transposed", "model.part"):
        part = got[name].rows(1, 2)
        np.testing.assert_array_equal(part.read(), want[name][1:2].numpy())
        np.testing.assert_array_equal(part.squeezed().read(), want[name][1].numpy())
    for key, stored in got.items():
        value = stored.read()
        assert value.shape == tuple(want[key].shape)
        assert key == "model.none" or not value.flags.writeable
        if key == "model.bf16":
            assert value.dtype == ml_dtypes.bfloat16
            value = value.astype(np.float32)
        np.testing.assert_array_equal(value, want[key].detach().float().numpy(), err_msg=key)


class Calls:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {path}",), "posix.system"),
        (eval, ("1",), "__builtin__.eval"),
        (getattr, (np, "save"), "__builtin__.getattr"),
        (np.zeros, (3,), "numpy.zeros"),
        (collections.Counter, ("ab",), "collections.Counter"),
    ],
)
def test_a_pth_file_that_calls_functions(function, args, name, torch, tmp_path):
    path = tmp_path / "ran"
    args = [a.format(path=path) if isinstance(a, str) else 0 if a is np else a for a in args]
    torch.save({"w": torch.zeros(2), "x": Calls(function, *args)}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=f"it names {name}, which no array needs"):
        read_pth(tmp_path / "evil.pth")
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (4,), (1,)), (2, (2,), (1,)), (0, (2,), (3,)), (-1, (2,), (1,)), (2, (2,), (-1,))],
)
def test_a_tensor_beyond_its_storage(offset, shape, strides, torch, tmp_path):
    rebuild = torch._utils._rebuild_tensor_v2
    tensor = Calls(rebuild, torch.zeros(3).storage(), offset, shape, strides, False, {})
    torch.save({"x": tensor}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="beyond its storage"):
        read_pth(tmp_path / "w.pth")


def test_pth_files_that_are_cut_old_or_empty(torch, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(WeightsError, match="cut off"):
        read_pth(path)
    torch.save({"x": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match="files from before torch"):
        read_pth(path)
    torch.save({"step": 3}, path)
    with pytest.raises(WeightsError, match="holds no arrays"):
        read_pth(path)


def test_a_pickle_that_changes_what_it_was_given(torch, tmp_path):
    """BUILD sets attributes without a call. It cannot set an attribute of a stand-in that is
    read."""
    torch.save({"x": torch.zeros(3)}, tmp_path / "w.pth")
    for state in (b"}X\x06\0\0\0offsetK\x63s", b"N}X\x06\0\0\0offsetK\x63s\x86"):
        out = io.BytesIO()
        with zipfile.ZipFile(tmp_path / "w.pth") as old, zipfile.ZipFile(out, "w") as new:
            for info in old.infolist():
                content = old.read(info)
                if info.filename.endswith("data.pkl"):
                    assert content.endswith(b"s.")  # SETITEM of the tensor, STOP
                    content = content[:-2] + state + b"bs."
                    assert pickle.BUILD == b"b"
                new.writestr(info, content)
        (tmp_path / "evil.pth").write_bytes(out.getvalue())
        with pytest.raises(WeightsError, match="cannot be read as weights"):
            read_pth(tmp_path / "evil.pth")


# Files that no torch writes


def saved(path, content):
    path.write_bytes(content)
    return path


ROW = samples.ARRAYS["a.bias"]  # four entries in the storage 1


def test_a_file_made_without_torch_is_read(tmp_path):
    got = read_pth(saved(tmp_path / "w.pth", samples.pth()))
    assert got.keys() == {f"state_dict.{name}" for name in samples.ARRAYS}
    for name, array in samples.ARRAYS.items():
        np.testing.assert_array_equal(got[f"state_dict.{name}"].read(), array)


def test_a_pickle_that_would_change_a_type(tmp_path):
    state = b"(K\x03X\x01\0\0\0>NNNK\x02K\x01K\x00tb0"
    program = b"\x80\x02ctorch\nBFloat16Storage\n" + state + samples.dump(samples.state_dict())[2:]
    with pytest.raises(WeightsError, match=r"w\.pth .*sets attributes of an object"):
        read_pth(saved(tmp_path / "w.pth", samples.pth(program)))
    assert np.array([1, 2], ml_dtypes.bfloat16).tobytes() == b"\x80\x3f\x00\x40"


def nested(levels):
    """Return a dictionary that holds the one below it twice, `levels` deep."""
    value = {"w": samples.Tensor(ROW, 1)}
    for _ in range(levels):
        value = {"a": value, "b": value}
    return value


def in_itself():
    value = {"w": samples.Tensor(ROW, 1)}
    value["again"] = value
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (nested(40), "nested more than 16 deep"),
        (nested(9), None),
        (in_itself(), "nested more than 16 deep"),
        ({str(i): [nested(14)] * 3 for i in range(3)}, "holds no arrays"),
        ({str(i): nested(9) for i in range(4)}, "more than 3,000 entries"),
        ({"a" * 1001: samples.Tensor(ROW, 1)}, "has more than 1000 characters"),
        ({"a.b": samples.Tensor(ROW, 1), "a": {"b": samples.Tensor(ROW, 1)}}, "the name 'a.b'"),
        ({"a": samples.Tensor(ROW, 9)}, "its storage '9' is missing"),
        ({"a": samples.Tensor(ROW, "../data.pkl")}, "storage '../data.pkl' is missing"),
        ({"a": samples.Tensor(ROW, 0)}, "the size of the storage '0' is not the pickle's"),
        ({"a": samples.Tensor(ROW, 1, shape=(4, 10**6), strides=(1, 0))}, "repeats the entries"),
        ({"a": samples.Tensor(ROW, 1, shape=(5,))}, "reaches beyond its storage"),
        ({"a": samples.Tensor(ROW, 1, shape=(2,), strides=(4,))}, "reaches beyond its storage"),
        ({"a": samples.Tensor(ROW, 1, offset=-1)}, "reaches beyond its storage"),
        ({"a": samples.Tensor(ROW, 1, shape=(0, 2**62), strides=(1, 1))}, "no shape of an array"),
        ({"a": samples.Tensor(ROW, 1, shape=(4.0,))}, "no shape of an array"),
        ({"a": samples.Tensor(ROW, 1, shape=(True,))}, "no shape of an array"),
        ({"a": samples.Tensor(ROW, 1, shape=[4])}, "are no tuple"),
        ({"a": samples.Tensor(ROW, 1, offset=0.0)}, "is no integer"),
        ({"a": samples.Tensor(ROW, 1, strides=(1, 1))}, "has 2 strides"),
        ({"a": samples.Tensor(ROW, 1, storage=None)}, "a tensor has no storage"),
        ({"a": samples.Tensor(ROW, 1, metadata={"neg": True})}, "negated or conjugated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # some are endless
)
def test_tensors_that_are_refused(value, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(pth, "MOST_ENTRIES", 3000)
    path = saved(tmp_path / "w.pth", samples.pth(samples.dump(value)))
    if reason is None:
        assert len(read_pth(path)) == 2**9
        return
    with pytest.raises(WeightsError, match=rf"w\.pth .*{reason}"):
        read_pth(path)


def change(content, old, new, count=1):
    """Return bytes with a part exchanged for one of the same length."""
    assert len(old) == len(new) and content.count(old) >= count, content
    return content.replace(old, new, count)


def zip_files():
    """Return {reason: file}."""
    honest = samples.pth()
    first = honest.index(b"a/data/1") - 30  # the local header of a storage
    central = honest.rindex(b"a/data/1") - 46  # and its entry in the directory
    second = honest.rindex(b"a/data/0") - 46
    files = {
        "entries are compressed": samples.pth(compression=zipfile.ZIP_DEFLATED),
        "its arrays are 'big' endian": samples.pth(byteorder=b"big"),
        r"2 data\.pkl inside": samples.pth(**{"b/data.pkl": b"N."}),
        r"no data\.pkl inside": change(honest, b"data.pkl", b"data.pkx", 2),
        "two entries of its zip file have one name": change(honest, b"a/data/3", b"a/data/2", 2),
        "the header of 'a/data/1' is damaged": change(honest, b"a/data/1", b"a/data/7"),
        # Two entries in one place of the file.
        "in one place": honest[: central + 42] + honest[second + 42 : second + 46],
    }
    files["in one place"] += honest[central + 46 :]

    # The length of an extra field moves the storage.
    moved = bytearray(honest)
    moved[first + 28] += 1
    files["header of 'a/data/1' is damaged"] = bytes(moved)
    return files


@pytest.mark.parametrize(("reason", "content"), zip_files().items(), ids=lambda v: repr(v)[:30])
def test_zip_files_that_are_refused(reason, content, tmp_path):
    with pytest.raises(WeightsError, match=rf"w\.pth .*{reason}"):
        read_pth(saved(tmp_path / "w.pth", content))


def test_a_directory_of_millions_of_entries_is_not_read(tmp_path):
    end = b"PK\x05\x06" + bytes(4) + b"\xff\xff\xff\xff"
    end += (9 << 20).to_bytes(4, "little") + bytes(6)
    path = saved(tmp_path / "w.pth", bytes(9 << 20) + end)
    with pytest.raises(WeightsError, match=r"w\.pth .*directory has more than 8,388,608 bytes"):
        read_pth(path)


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(FileError, match=r"w\.pth is a pipe"):
        read_pth(tmp_path / "w.pth")
