"""Files of weights: opened, loaded onto the mesh in shards, and refused."""

import collections
import json
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.interop.small_weights import ABSTRACT, LAYERS, ROWS, THEIRS, normal, save
from vdx.interop.components import open_component
from vdx.interop.keymap import WeightsError, gather
from vdx.interop.load import abstract_params, load_params, open_weights
from vdx.interop.stored_array import StoredArray, read_finite
from vdx.parallel import MeshSpec


@pytest.fixture
def file(tmp_path):
    return save(tmp_path / "model.safetensors", THEIRS)


@pytest.fixture
def reads(monkeypatch):
    """How often each array is read: Counter of (file, offset)."""
    count, read = collections.Counter(), StoredArray.read

    def counted(stored):
        count[stored.file, stored.offset] += 1
        return read(stored)

    monkeypatch.setattr(StoredArray, "read", counted)
    return count


# Folders.


def parts(folder, **names):
    """A model in two shards; `names` replace entries of the index."""
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
def test_parameters_are_loaded_in_shards_and_read_once(spec, dtype, file, reads):
    mesh = MeshSpec(**spec).make()
    source = open_weights(file)
    abstract = abstract_params(ABSTRACT, mesh, dtype)
    got = load_params(source, abstract, ROWS)
    assert set(reads.values()) == {1} and len(reads) == len(THEIRS)
    want = gather(THEIRS.get, THEIRS, abstract, ROWS)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda a, b: (a.dtype, a.sharding) == (b.dtype, b.sharding), got, abstract)
    kernel = got["layers"]["up"]["kernel"]
    assert kernel.dtype == jnp.dtype(dtype) and got["norm"]["scale"].dtype == jnp.float32
    assert (
        kernel.addressable_shards[0].data.size * mesh.shape["fsdp"] * mesh.shape["tensor"]
        == kernel.size
    )


def test_layers_may_be_sharded_too(file):
    """A sharding of the stack itself, as pipelines have it."""
    mesh = MeshSpec(data=1, fsdp=4, tensor=2).make()
    sharding = NamedSharding(mesh, P("fsdp", None, "tensor"))
    abstract = jax.tree.map(lambda a: a, ABSTRACT)
    abstract["layers"]["up"]["kernel"] = jax.ShapeDtypeStruct(
        (LAYERS, 8, 16), jnp.float32, sharding=sharding
    )
    got = load_params(open_weights(file), abstract, ROWS)  # the rest is on one device
    jax.tree.map(np.testing.assert_array_equal, got, gather(THEIRS.get, THEIRS, ABSTRACT, ROWS))
    assert got["layers"]["up"]["kernel"].sharding == sharding


def test_what_does_not_fit_is_reported_before_anything_is_read(file, reads, tmp_path):
    changed = {**THEIRS, "blocks.2.q.weight": normal(8, 6), "norm.weight": normal(9)}
    save(tmp_path / "changed.safetensors", changed)
    with pytest.raises(WeightsError) as error:
        load_params(open_weights(tmp_path / "changed.safetensors"), ABSTRACT, ROWS)
    assert "blocks.2.q.weight: is (6, 8) for layers/q/kernel (8, 8)" in str(error.value)
    assert "norm.weight: is (9,) for norm/scale (8,)" in str(error.value)
    source = open_weights(file)
    del source["norm.weight"]
    with pytest.raises(WeightsError, match=r"norm/scale .*: not in the file"):
        load_params(source, ABSTRACT, ROWS)
    assert not reads


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", THEIRS)
def test_values_that_are_not_finite_are_refused_with_their_key(key, value, tmp_path):
    changed = {**THEIRS, key: THEIRS[key].copy()}
    where = np.random.default_rng(len(key)).integers(changed[key].size)
    changed[key].reshape(-1)[where] = value
    path = save(tmp_path / "w.safetensors", changed)
    with pytest.raises(WeightsError, match=rf"w.safetensors: {re.escape(key)} holds NaN or inf"):
        load_params(open_weights(path), ABSTRACT, ROWS)


def test_every_part_of_a_large_array_is_tested(tmp_path, monkeypatch):
    monkeypatch.setattr("vdx.interop.stored_array.CHUNK", 24)  # three rows of blocks.0.q
    for row in range(8):
        array = THEIRS["blocks.0.q.weight"].copy()
        array[row, row] = np.nan
        path = save(tmp_path / f"{row}.safetensors", {"q": array})
        with pytest.raises(WeightsError, match="q holds NaN"):
            read_finite("q", open_weights(path)["q"])


def test_a_file_of_torch(tmp_path, file):
    torch = pytest.importorskip("torch")
    torch.save({k: torch.from_numpy(v) for k, v in THEIRS.items()}, tmp_path / "w.pth")
    abstract = abstract_params(ABSTRACT, MeshSpec(data=1, fsdp=4, tensor=2).make())
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(open_weights(tmp_path / "w.pth"), abstract, ROWS),
        load_params(open_weights(file), abstract, ROWS),
    )


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
    abstract = abstract_params(shapes, mesh, "bfloat16")
    rows = [Row("{i}." + n, n + "/kernel[{i}]", halves(2) if n == "q" else LINEAR) for n in names]
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, start = peak(), time.perf_counter()
    params = load_params(open_weights(path), abstract, rows)
    seconds = time.perf_counter() - start
    # On two of eight devices each: the simulated devices have everything twice.
    model = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
    for k, name in enumerate(names):
        found = np.asarray(params[name]["kernel"][layers - 1]).astype(np.float32).max()
        assert found == np.float32(jnp.bfloat16((k + 1) * layers)), (name, found)
    print(json.dumps({"model": model, "file": end, "largest": 2 * layers * 5792 * 5792,
                      "before": before, "peak": peak(), "seconds": seconds}))
""")


@pytest.mark.slow
def test_the_host_holds_one_parameter_in_addition_to_the_model(tmp_path):
    """A file of 4 GB onto eight devices, whose memory is the host's own here."""
    path = tmp_path / "model.safetensors"
    try:
        out = subprocess.run(
            [sys.executable, "-c", STREAM, str(path)], check=True, capture_output=True, text=True
        ).stdout
    finally:
        path.unlink(missing_ok=True)
    found = json.loads(out)
    additional = found["peak"] - found["model"]
    gigabytes = {name: f"{size / 1e9:.2f} GB" for name, size in found.items() if name != "seconds"}
    print(f"{found['seconds']:.0f} s; {gigabytes}; in addition {additional / 1e9:.2f} GB")
    assert additional < found["largest"] + 1e9


@pytest.mark.parametrize(
    "prefix", ["generator_ema.model.", "generator.model._fsdp_wrapped_module.", "model."]
)
def test_a_distilled_generator_is_no_pipeline(prefix, tmp_path):
    key = "blocks.0.self_attn.q.weight"
    path = save(tmp_path / "self_forcing.safetensors", {f"{prefix}{key}": normal(8, 8)})
    with pytest.raises(WeightsError, match=r"few-step sampler that it needs is not there yet"):
        open_component("transformer", path, "float32")
    # ComfyUI's prefix is that of an ordinary file.
    path = save(tmp_path / "comfy.safetensors", {f"model.diffusion_model.{key}": normal(8, 8)})
    with pytest.raises(WeightsError, match="These are not the weights of a Wan transformer"):
        open_component("transformer", path, "float32")
