"""Every shape of batch has a program of its own, compiled once and before it is needed."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.data.pipeline import Loader
from vdx.experiment import Experiment
from vdx.hardware import CHIPS
from vdx.parallel import MeshSpec, abstract_batch, put_batch
from vdx.train import compile as compile_module
from vdx.train.compile import StepCompiler, TrainProgram


def clips(n, frames, height=8, width=8):
    rng = np.random.default_rng(n * frames)
    return {
        "video": rng.integers(0, 255, (n, frames, height, width, 3), np.uint8),
        "place": np.arange(n),
        "key": np.array(["a"] * n),
    }


@pytest.fixture
def world():
    """(makes a StepCompiler, shapes that were traced, mesh of two devices, an event that all
    programs but the first wait for)."""
    mesh, traced, go = MeshSpec().make(jax.devices()[:2]), [], threading.Event()

    def step(state, batch, frozen):
        assert not traced or go.wait(20)
        traced.append(batch["video"].shape)
        return state + batch["video"].astype(jnp.float32).mean() * frozen, batch["place"].sum()

    def make(loader=None, samples=(), model=None):
        return StepCompiler(
            TrainProgram(jax.jit(step, donate_argnums=0), jax.ShapeDtypeStruct((), jnp.float32)),
            jnp.float32(2),
            model or SimpleNamespace(channels=3, num_tokens=lambda shape: 10 * shape[1]),
            loader or Loader(global_batch=4),
            mesh,
            lambda: samples,
        )

    return make, traced, mesh, go


def test_others_are_compiled_while_the_first_runs(world):
    make, traced, mesh, go = world
    batches = [clips(8, 2), clips(4, 4), clips(2, 8)]
    samples = [(len(b["place"]), {k: v[0] for k, v in b.items()}) for b in batches]
    compiler, state, total = make(samples=samples), jnp.float32(0), 0.0
    for i, batch in enumerate(3 * batches):
        if i == 1:  # the first step did not wait for the others, nor do they for a batch
            assert len(traced) == 1 and len(compiler.programs) == 3
            go.set()
            for made in compiler.programs.values():
                made.result()
            assert len(traced) == 3
        run, work = compiler(put_batch(mesh, batch))
        state, places = run(state, put_batch(mesh, batch), compiler.frozen)
        total += 2 * batch["video"].mean()
        assert work == (len(batch["place"]), 10 * batch["video"].shape[1] * len(batch["place"]), 0)
        assert places == batch["place"].sum()
    assert traced == [b["video"].shape for b in batches]  # each once, in order
    np.testing.assert_allclose(state, total, rtol=1e-5)
    compiler.close()


def test_an_unlisted_shape_is_compiled_when_it_comes(world):
    make, traced, mesh, go = world
    go.set()
    compiler = make(samples=[(4, {k: v[0] for k, v in clips(1, 3).items()})])
    for frames in (2, 5, 2, 3):
        compiler(put_batch(mesh, clips(4, frames)))
    assert sorted(shape[1] for shape in traced) == [2, 3, 5]
    compiler.close()


def test_a_batch_that_does_not_divide_fails_at_once(world):
    make = world[0]
    with pytest.raises(ConfigError, match=r"batch of 3 clips .* data and fsdp, 2 parts"):
        make(Loader(global_batch=2, buckets=((8, 8, 8, 4), (16, 8, 8, 3))))
    with pytest.raises(ConfigError, match="batch of 5 clips"):
        make(Loader(global_batch=5))


def test_a_bucket_that_is_no_number_of_patches(at_root):
    buckets = "--config.data.loader.buckets=((8, 32, 32, 8), (8, 30, 32, 8))"
    message = r"\(8, 30, 32\).*does not divide into patches"
    made = Experiment(resolve("configs/t2v_tiny.py", [buckets]))
    with pytest.raises(ConfigError, match=rf"config\.data\.loader\.buckets: .*{message}"):
        _ = made.tx

    with pytest.raises(ValueError, match=message):
        StepCompiler(
            TrainProgram(None, None),
            None,
            made.model,
            made.loader,
            MeshSpec().make(jax.devices()[:1]),
            list,
        )


def test_abstract_batches_match_real_ones(world):
    batch = clips(4, 2)
    abstract = abstract_batch(world[2], {k: v[0] for k, v in batch.items()}, 4)
    real = put_batch(world[2], batch)
    assert abstract.keys() == real.keys() == {"video", "place"}
    for name, x in real.items():
        assert (abstract[name].shape, abstract[name].dtype, abstract[name].sharding) == (
            x.shape,
            x.dtype,
            x.sharding,
        )


def test_operations_of_a_step_are_counted_where_a_peak_is_known(world, monkeypatch):
    make, _, mesh, _ = world
    assert compile_module.peak_flops(mesh) == 0
    monkeypatch.setattr(compile_module, "chip_of", lambda kind: CHIPS["v5e"])
    assert compile_module.peak_flops(mesh) == 2 * 197e12
    model = SimpleNamespace(
        channels=3, num_tokens=lambda shape: 1, flops=lambda shape, text: 1e6 * np.prod(shape)
    )
    _, work = make(model=model)(put_batch(mesh, clips(4, 2)))
    assert work.flops == 3 * 4 * 2 * 8 * 8 * 3 * 1e6
