"""Parameters into files: there and back, in shards with an index, and refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.small_weights import ABSTRACT, ROWS, SHAPES, THEIRS, save
from vdx.interop.keymap import WeightsError
from vdx.interop.load import abstract_params, load_params, open_weights
from vdx.interop.save import export_plan, save_folder
from vdx.parallel import MeshSpec


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("most", [10**6, 1500])
def test_there_and_back(dtype, most, tmp_path):
    theirs = {k: v.astype(jnp.dtype(dtype)) for k, v in THEIRS.items()}
    abstract = abstract_params(ABSTRACT, MeshSpec(data=1, fsdp=4, tensor=2).make(), dtype)
    params = load_params(open_weights(save(tmp_path / "in.safetensors", theirs)), abstract, ROWS)
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
    jax.tree.map(np.testing.assert_array_equal, load_params(back, abstract, ROWS), params)
    if most == 1500:
        index = json.loads((tmp_path / "out" / files[-1]).read_text())
        assert files[-1] == "diffusion_pytorch_model.safetensors.index.json"
        assert index["metadata"]["total_size"] == sum(
            np.prod(s) * d.itemsize for s, d in export_plan(params, ROWS).values()
        )
    with pytest.raises(WeightsError, match="is not empty"):
        save_folder(params, ROWS, {}, tmp_path / "out")


def test_a_parameter_without_a_row_is_not_saved(tmp_path):
    other = {**SHAPES, "lora": {"kernel": (3, 3)}}
    params = jax.tree.map(np.zeros, other, is_leaf=lambda s: isinstance(s, tuple))
    with pytest.raises(WeightsError, match="lora/kernel: no row"):
        save_folder(params, ROWS, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
