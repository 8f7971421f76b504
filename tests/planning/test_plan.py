"""The planner: programs, needs, plans, their text and the search."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app

from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.data.records import ready_example
from vdx.experiment import Experiment
from vdx.hardware import GIB
from vdx.parallel import MeshSpec, put_batch
from vdx.plan import parse_sizes
from vdx.planning.compiled import out_of_memory
from vdx.planning.estimate import bytes_per_device, least_memory
from vdx.planning.job import Job, Slice, complete_shapes
from vdx.planning.planner import plan_job
from vdx.planning.programs import model_flops, stated_flops
from vdx.planning.search import meshes, search
from vdx.planning.table import ranking, table
from vdx.train.compile import abstract_train_batch

ROOT = Path(__file__).parents[2]
SHAPE = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.fixture(scope="module")
def base():
    config = resolve(
        f"{ROOT}/configs/t2v_base.py",
        ["--config.model.backbone.size=tiny", "--config.data.loader.global_batch=32"],
    )
    return Job(Experiment(config), "train", (16, 32, 32, 4), 256)


@pytest.fixture(scope="module")
def planned(base):
    return plan_job(base, Slice("h100:8"))


def test_a_gpu_is_planned_without_a_compiler(base, planned):
    row = planned.to_json()
    json.dumps(row)
    assert row["mesh"] == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1} and row["fits"]
    state = 16 * row["parameters"] / 8  # weights, average, two moments
    batch = 32 / 8 * (16 * 32 * 32 * 4 * 2 + 256 * 4096 * 2)
    assert row["memory"]["arguments"] == pytest.approx(state + batch, rel=0.04)
    assert row["model_flops"] == 3 * 32 * base.experiment.model.flops((16, 32, 32, 4), 256)
    assert row["stated_flops"] == pytest.approx(4 / 3 * row["model_flops"], rel=0.01)  # remat
    text = table(planned, 1000, 2.0)
    assert "estimated, not compiled" in text and "USD" in text and "fits" in text


@pytest.mark.slow
def test_a_sampler_and_a_decoder(base):
    e = base.experiment
    sample = dataclasses.replace(base, what="sample")
    assert model_flops(sample) == 50 * 2 * 16 * e.model.flops((16, 32, 32, 4), 256)
    # Keys and values of the conditions are computed once, not in each of the 50 steps.
    assert stated_flops(sample) == pytest.approx(model_flops(sample), rel=0.02)
    decode = dataclasses.replace(base, what="decode", clip=(2, 8, 8, 4))
    assert model_flops(decode) == stated_flops(decode) > 1e9


def test_least_memory_grows_with_the_clips(base):
    mesh = Slice("h100:8").mesh(MeshSpec(fsdp=4))
    one, two = (least_memory(base, mesh, clips) for clips in (32, 64))
    assert two["kept"] == 2 * one["kept"] > 0
    assert two["gradients"] == one["gradients"] and two["arguments"] > one["arguments"]
    assert bytes_per_device(SHAPE(3, 4)) == 48


def test_a_batch_without_data_has_the_shapes_of_one_with_data(mesh, at_root):
    for name in ("t2v_tiny", "control_tiny"):
        e = Experiment(resolve(f"configs/{name}.py", ["--config.data.loader.global_batch=2"]))
        batches = e.batches(workers=0)
        real = put_batch(mesh, next(batches))
        batches.close()
        clip = (*real["video"].shape[1:4], e.model.channels)
        assert clip == complete_shapes(e, None, None)[0]
        abstract = abstract_train_batch(e.model, mesh, clip, global_batch=2, cached=False)
        assert facts(abstract) == facts(real), name


def facts(batch):
    return {k: (v.shape, str(v.dtype)) for k, v in batch.items()}


def test_a_cached_batch_has_the_shapes_of_the_cache(base, mesh):
    row = {
        "latents": np.zeros((16, 32, 32, 4), np.float16),
        "fps": 8.0,
        "num_frames": 16,
        "text": np.zeros((9, 4096), np.float16),
    }
    example = ready_example(row, "a", {"text": [256, 4096]})
    del example["key"]
    real = put_batch(mesh, {k: np.stack([v] * 32) for k, v in example.items()})
    model = base.experiment.model
    abstract = abstract_train_batch(model, mesh, base.clip, global_batch=32, cached=True, text=256)
    assert facts(abstract) == facts(real)


def test_out_of_memory_is_a_result(planned):
    assert out_of_memory(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 51.34G of 31.25G hbm. "
        "Exceeded hbm capacity by 20.09G."
    ) == (51.34 * GIB, 31.25 * GIB)
    assert out_of_memory(
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.83G) exceeds "
        "available HBM (15.75G)."
    ) == (20.83 * GIB, 15.75 * GIB)
    plan = dataclasses.replace(
        planned,
        fits=False,
        compiled=True,
        compile_seconds=1.0,
        memory_has=31.25 * GIB,
        memory={"needs": 51.34 * GIB},
        counts=None,
        bounds=None,
    )
    text = table(plan, 1000, None)
    assert "needs 51.34 GiB of 31.25" in text and "grad_accum_steps=2" in text
    assert "does not fit" in ranking([plan])


@pytest.mark.slow
def test_a_search_prunes_and_sorts(base, capsys):
    plans = search(base, Slice("a100-40:2"), 3)
    times = [plan.seconds_per_clip for plan in plans]
    assert len(plans) == 3 and times == sorted(times)
    assert "variants" in capsys.readouterr().out
    assert "mesh" in ranking(plans)


@pytest.mark.parametrize(
    ("name", "message"),
    [("v9:2x2", "unknown name 'v9'"), ("v5e", "is not like v5e:4x4"), ("h100:2x4", "is not like")],
)
def test_malformed_slices_are_errors(name, message):
    with pytest.raises(ConfigError, match=message):
        assert Slice(name).chip and Slice(name).devices


def test_without_the_compiler_the_error_is_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vdx\[tpu\]'"):
        Slice("v5e:2x2").mesh(MeshSpec())


def test_missing_and_malformed_shapes_are_errors(base):
    with pytest.raises(ConfigError, match="--clip=16,32,32 --text=256"):
        complete_shapes(base.experiment, None, None)
    with pytest.raises(ConfigError, match="is not frames, height and width"):
        complete_shapes(base.experiment, (16, 32), 256)
    with pytest.raises(app.UsageError):
        parse_sizes("16,a")
    assert complete_shapes(base.experiment, (8, 16, 16), 77) == ((8, 16, 16, 4), 77)


def test_meshes():
    found = list(meshes(8))
    assert len(found) == 20 and all(math.prod(mesh.values()) == 8 for mesh in found)
