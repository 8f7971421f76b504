"""Keys and values of the text, computed once a clip: the same clips, outside the loop."""

import re

import jax
import numpy as np
import pytest

from tests.xla_flags import EXACT
from vdx.diffusion.process import RectifiedFlow
from vdx.generate.blockwise import BlockwiseGenerator
from vdx.generate.generator import Generator, Sampling
from vdx.models.adapters.lora import Lora, WeightDelta, adapt, dense_kernels
from vdx.models.denoiser import Denoiser

RNG = np.random.default_rng(0)
BACKBONE = {
    "name": "transformer",
    "channels": 2,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "patch": (1, 2, 2),
}
SIGNALS = {"embeddings": {"features": 6}, "image_tokens": {"features": 5}}
SAMPLING = Sampling(sampler="euler", steps=3, guidance=3.0)
BATCH = {
    "text": RNG.normal(size=(2, 3, 6)).astype(np.float32),
    "text_mask": np.array([[True, True, True], [True, True, False]]),
    "image_tokens": RNG.normal(size=(2, 2, 5)).astype(np.float32),
}
NOISE = RNG.normal(size=(2, 4, 4, 4, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def programs(randomise):
    """(kind) -> the compiled draw and its arguments."""

    def make(kind):
        pattern = ({"name": "full", "block": 2},) if kind == "blocks" else ("full",)
        model = Denoiser({**BACKBONE, "pattern": pattern}, SIGNALS)
        params = randomise(jax.eval_shape(model.new_params, jax.random.key(0)))
        if kind == "adapted":
            lora = Lora(rank=2)
            factors = randomise(
                jax.eval_shape(
                    lambda: lora.new_factors(
                        jax.random.key(0), lora.select_kernels(dense_kernels(model.new_params))
                    )
                )
            )
            params = adapt(params, WeightDelta(factors))
        generator = (BlockwiseGenerator if kind == "blocks" else Generator)(
            model, RectifiedFlow(), SAMPLING, (4, 4, 2)
        )
        args = params, BATCH, NOISE, jax.random.split(jax.random.key(0), len(NOISE))
        draw = jax.jit(lambda *args: generator.draw(*args)[0])
        return draw.lower(*args).compile(EXACT), args

    return make


def names(program, what: str) -> list[str]:
    """Names of the matrix products of a layer, without the methods that called it."""
    text = re.sub(r"/\w+\.\w+(?=/)", "", program.as_text())  # such as cross.keys_values
    return re.findall(rf'op_name="([^"]*/{what}/dot_general[^"]*)"', text)


def depth(name: str) -> int:
    return name.count("while/body")


@pytest.mark.parametrize(
    "kind", ["plain", "adapted", pytest.param("blocks", marks=pytest.mark.slow)]
)
def test_clips_are_the_same_and_the_loop_computes_no_text(kind, programs, monkeypatch):
    program, args = programs(kind)
    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "precompute_cross_kv", lambda self, *args, **more: {})
        plain, _ = programs(kind)
    got, want = program(*args), plain(*args)
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=0)
    for name in ("cross/k", "cross/v", "cross/image_k", "cross/image_v"):
        # Loops over blocks, steps and layers. The compiler leaves it in them.
        assert max(map(depth, names(plain, name))) == (3 if kind == "blocks" else 2)
        assert set(map(depth, names(program, name))) == {1}
    # And nothing else is computed for them.
    for name in ("cross/q", "mlp/up"):
        assert 1 not in set(map(depth, names(program, name)))
