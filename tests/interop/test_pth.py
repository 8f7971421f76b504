"""PyTorch's files without torch: every array is read, and no code in them is run."""

import collections
import io
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

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
