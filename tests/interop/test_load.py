"""Files of weights: read in part, put on the mesh in shares, written back, and refused."""

import collections
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vdx.interop.keymap import CONV, LINEAR, Row, WeightsError, gather
from vdx.interop.load import abstract_params, load_params, open_weights
from vdx.interop.safetensors import DTYPES, read_header, write
from vdx.interop.save import export_plan, save_folder
from vdx.interop.stored_array import StoredArray
from vdx.interop.wan_keys import halves
from vdx.parallel import MeshSpec

RNG = np.random.default_rng(0)
LAYERS = 4
ROWS = (
    Row("blocks.{i}.q.weight", "layers/q/kernel[{i}]", halves(2)),
    Row("blocks.{i}.up.weight", "layers/up/kernel[{i}]", LINEAR),
    Row("blocks.{i}.up.bias", "layers/up/bias[{i}]"),
    Row("conv.weight", "conv/kernel", CONV),
    Row("norm.weight", "norm/scale"),
    Row("", "text/null"),
)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


THEIRS = {
    **{f"blocks.{i}.q.weight": normal(8, 8) for i in range(LAYERS)},
    **{f"blocks.{i}.up.weight": normal(16, 8) for i in range(LAYERS)},
    **{f"blocks.{i}.up.bias": normal(16) for i in range(LAYERS)},
    "conv.weight": normal(4, 8, 3, 3),
    "norm.weight": normal(8),
}
SHAPES = {
    "layers": {
        "q": {"kernel": (LAYERS, 8, 8)},
        "up": {"kernel": (LAYERS, 8, 16), "bias": (LAYERS, 16)},
    },
    "conv": {"kernel": (3, 3, 8, 4)},
    "norm": {"scale": (8,)},
    "text": {"null": (6,)},
}
LIKE = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
)


def save(path, arrays):
    write(path, {k: (v.shape, v.dtype) for k, v in arrays.items()}, arrays.items())
    return path


@pytest.fixture
def file(tmp_path):
    return save(tmp_path / "model.safetensors", THEIRS)


@pytest.fixture
def reads(monkeypatch):
    """How often each array was looked at: Counter of (file, offset)."""
    count, read = collections.Counter(), StoredArray.read

    def counted(stored):
        count[stored.file, stored.offset] += 1
        return read(stored)

    monkeypatch.setattr(StoredArray, "read", counted)
    return count


# The format.


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
def test_a_file_that_is_cut_off(file, keep):
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


# Folders.


def parts(folder, **names):
    """A model in two parts; `names` replace entries of the index."""
    folder.mkdir(exist_ok=True)
    keys = list(THEIRS)
    where = {}
    for i, some in enumerate((keys[:5], keys[5:]), 1):
        save(folder / f"m-{i}.safetensors", {k: THEIRS[k] for k in some})
        where |= dict.fromkeys(some, f"m-{i}.safetensors")
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": where | names}))
    return folder


def test_one_file_and_several_parts_are_the_same_model(file, tmp_path):
    whole, split = open_weights(file), open_weights(parts(tmp_path / "parts"))
    assert whole.keys() == split.keys() == open_weights(tmp_path).keys()
    for key in whole:
        np.testing.assert_array_equal(whole[key].read(), split[key].read())


def test_a_part_that_is_missing(tmp_path):
    folder = parts(tmp_path)
    (folder / "m-2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks 1 of the 2 files .*\n  m-2.safetensors"):
        open_weights(folder)


def test_an_index_that_does_not_agree(tmp_path):
    folder = parts(tmp_path, strange="m-1.safetensors")
    with pytest.raises(WeightsError, match=r"does not agree .*\n  strange: not in m-1"):
        open_weights(folder)


def test_folders_of_none_and_of_several(tmp_path, file):
    with pytest.raises(WeightsError, match="is not there"):
        open_weights(tmp_path / "no")
    (tmp_path / "a" / "transformer").mkdir(parents=True)
    (tmp_path / "a" / "vae").mkdir()
    for part in ("transformer", "vae"):
        save(tmp_path / "a" / part / "x.safetensors", THEIRS)
    with pytest.raises(
        WeightsError,
        match=r"holds no .safetensors file. Name one of its "
        r"folders: transformer, vae",
    ):
        open_weights(tmp_path / "a")
    save(tmp_path / "other.safetensors", THEIRS)
    with pytest.raises(WeightsError, match=r"several: model.safetensors, other.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(WeightsError, match=r"gguf: weights are read from .safetensors, .pth"):
        open_weights(tmp_path / "model.gguf")


# Onto the mesh.


@pytest.mark.parametrize(
    "spec", [{"data": 8}, {"data": 1, "fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_arrive_in_shares_and_are_read_once(spec, dtype, file, reads):
    mesh = MeshSpec(**spec).make()
    source = open_weights(file)
    like = abstract_params(LIKE, mesh, dtype)
    got = load_params(source, like, ROWS)
    assert set(reads.values()) == {1} and len(reads) == len(THEIRS)
    want = gather(THEIRS.get, THEIRS, like, ROWS)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda a, b: (a.dtype, a.sharding) == (b.dtype, b.sharding), got, like)
    kernel = got["layers"]["up"]["kernel"]
    assert kernel.dtype == jnp.dtype(dtype) and got["norm"]["scale"].dtype == jnp.float32
    assert (
        kernel.addressable_shards[0].data.size * mesh.shape["fsdp"] * mesh.shape["tensor"]
        == kernel.size
    )


def test_layers_may_be_split_too(file):
    """A sharding of the stack itself, as pipelines have it."""
    mesh = MeshSpec(data=1, fsdp=4, tensor=2).make()
    sharding = NamedSharding(mesh, P("fsdp", None, "tensor"))
    like = jax.tree.map(lambda a: a, LIKE)
    like["layers"]["up"]["kernel"] = jax.ShapeDtypeStruct(
        (LAYERS, 8, 16), jnp.float32, sharding=sharding
    )
    got = load_params(open_weights(file), like, ROWS)  # the rest lies on one device
    jax.tree.map(np.testing.assert_array_equal, got, gather(THEIRS.get, THEIRS, LIKE, ROWS))
    assert got["layers"]["up"]["kernel"].sharding == sharding


def test_what_does_not_fit_is_said_before_anything_is_read(file, reads, tmp_path):
    changed = {**THEIRS, "blocks.2.q.weight": normal(8, 6), "norm.weight": normal(9)}
    save(tmp_path / "changed.safetensors", changed)
    with pytest.raises(WeightsError) as error:
        load_params(open_weights(tmp_path / "changed.safetensors"), LIKE, ROWS)
    assert "blocks.2.q.weight: is (6, 8) for layers/q/kernel (8, 8)" in str(error.value)
    assert "norm.weight: is (9,) for norm/scale (8,)" in str(error.value)
    source = open_weights(file)
    del source["norm.weight"]
    with pytest.raises(WeightsError, match=r"norm/scale .*: not in the file"):
        load_params(source, LIKE, ROWS)
    assert not reads


def test_a_file_of_torch(tmp_path, file):
    torch = pytest.importorskip("torch")
    torch.save({k: torch.from_numpy(v) for k, v in THEIRS.items()}, tmp_path / "w.pth")
    like = abstract_params(LIKE, MeshSpec(data=1, fsdp=4, tensor=2).make())
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(open_weights(tmp_path / "w.pth"), like, ROWS),
        load_params(open_weights(file), like, ROWS),
    )


# And back.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("most", [10**6, 1500])
def test_there_and_back(dtype, most, tmp_path):
    theirs = {k: v.astype(jnp.dtype(dtype)) for k, v in THEIRS.items()}
    like = abstract_params(LIKE, MeshSpec(data=1, fsdp=4, tensor=2).make(), dtype)
    params = load_params(open_weights(save(tmp_path / "in.safetensors", theirs)), like, ROWS)
    save_folder(params, ROWS, {"_class_name": "Some"}, tmp_path / "out", most)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files[0] == "config.json" and (len(files) > 3) == (most == 1500)
    back = open_weights(tmp_path / "out")
    assert back.keys() == THEIRS.keys()
    for key, stored in back.items():
        want = (
            theirs[key]
            if "kernel" in key or stored.dtype == theirs[key].dtype
            else theirs[key].astype(np.float32)
        )
        np.testing.assert_array_equal(stored.read(), want)
    jax.tree.map(np.testing.assert_array_equal, load_params(back, like, ROWS), params)
    if most == 1500:
        index = json.loads((tmp_path / "out" / files[-1]).read_text())
        assert files[-1] == "diffusion_pytorch_model.safetensors.index.json"
        assert index["metadata"]["total_size"] == sum(
            np.prod(s) * d.itemsize for s, d in export_plan(params, ROWS).values()
        )
    with pytest.raises(WeightsError, match="is not empty"):
        save_folder(params, ROWS, {}, tmp_path / "out")


def test_a_parameter_that_the_layout_cannot_say(tmp_path):
    other = {**SHAPES, "lora": {"kernel": (3, 3)}}
    params = jax.tree.map(np.zeros, other, is_leaf=lambda s: isinstance(s, tuple))
    with pytest.raises(WeightsError, match="lora/kernel: no row"):
        save_folder(params, ROWS, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Memory.

STREAM = textwrap.dedent("""
    import json, math, resource, sys, time
    import jax, jax.numpy as jnp, numpy as np
    from vdx.interop.keymap import LINEAR, Row
    from vdx.interop.load import abstract_params, load_params, open_weights
    from vdx.interop.wan_keys import halves
    from vdx.parallel import MeshSpec

    path, layers, names = sys.argv[1], 16, {"q": (5792, 5792), "up": (11584, 2896),
                                            "down": (2896, 11584), "v": (5792, 5792)}
    header, end = {}, 0
    for name, shape in names.items():
        for i in range(layers):
            begin, end = end, end + 2 * math.prod(shape)
            header[f"{i}.{name}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as f:                   # holes, but for a mark in the middle of each
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
        for n, entry in enumerate(header.values()):
            rows, columns = entry["shape"]
            f.seek(8 + len(text) + entry["data_offsets"][0] + 2 * columns * (rows // 2))
            f.write(np.asarray([n + 1], jnp.bfloat16).tobytes())

    shapes = {name: {"kernel": jax.ShapeDtypeStruct((layers, *shape[::-1]), jnp.bfloat16)}
              for name, shape in names.items()}
    mesh = MeshSpec(data=2, fsdp=2, tensor=2).make()
    like = abstract_params(shapes, mesh, "bfloat16")
    rows = [Row("{i}." + n, n + "/kernel[{i}]", halves(2) if n == "q" else LINEAR) for n in names]
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, start = peak(), time.perf_counter()
    params = load_params(open_weights(path), like, rows)
    seconds = time.perf_counter() - start
    # On two of eight devices each: the simulated devices hold everything twice.
    held = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
    for k, name in enumerate(names):
        found = np.asarray(params[name]["kernel"][layers - 1]).astype(np.float32).max()
        assert found == np.float32(jnp.bfloat16((k + 1) * layers)), (name, found)
    print(json.dumps({"held": held, "file": end, "largest": 2 * layers * 5792 * 5792,
                      "before": before, "peak": peak(), "seconds": seconds}))
""")


@pytest.mark.slow
def test_the_host_holds_one_parameter_beside_the_model(tmp_path):
    """A file of 4 GB onto eight devices, whose memory is the host's own here."""
    path = tmp_path / "model.safetensors"
    try:
        out = subprocess.run(
            [sys.executable, "-c", STREAM, str(path)], check=True, capture_output=True, text=True
        ).stdout
    finally:
        path.unlink(missing_ok=True)
    said = json.loads(out)
    beside = said["peak"] - said["held"]
    print(
        f"{said['file'] / 1e9:.2f} GB in {said['seconds']:.0f} s; peak {said['peak'] / 1e9:.2f}, "
        f"the model {said['held'] / 1e9:.2f}, beside it {beside / 1e9:.2f} GB; largest parameter "
        f"{said['largest'] / 1e9:.2f}, before {said['before'] / 1e9:.2f} GB"
    )
    assert beside < said["largest"] + 1e9
