"""The training step: every way to draw times, microbatches and loss terms against formulas."""

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdx.config.build import ConfigError
from vdx.diffusion.losses import LOSS_TERMS
from vdx.diffusion.process import PROCESSES
from vdx.diffusion.time_sampling import TIME_SAMPLERS
from vdx.experiment import build_loss_terms
from vdx.train.log import mean_losses
from vdx.train.objectives import Objective
from vdx.train.objectives.times import BlockTimes, ClipTimes, FirstFrameTimes
from vdx.train.state import init_state
from vdx.train.step import accumulated_gradients, make_train_step

CLIPS, FRAMES = 4, 6
SHAPE = (CLIPS, FRAMES, 2, 2, 3)
PARAMS = {"scale": jnp.float32(0.7), "shift": jnp.float32(-0.2)}
KEY = jax.random.key(5)


class Affine:
    """A network that predicts scale x_t + shift, and keeps the times that it is given."""

    block = 2
    backbone = SimpleNamespace(patch=(1, 1, 1))
    times: ClassVar[list] = []

    def run(self, params, x, time, batch, drop, method):
        self.times.append(time.shape)
        return params["scale"] * x + params["shift"]

    def num_tokens(self, shape):
        return 1

    def random_drop(self, key, clips):
        return {}

    def from_clip(self, key, x0):
        return {}


@dataclasses.dataclass(frozen=True)
class Flicker:
    """A term of these tests alone: the squared difference of neighbouring predicted frames."""

    weight: float = 1.0

    def __call__(self, process, prediction, x0, noise, times):
        return jnp.square(prediction[:, 1:] - prediction[:, :-1]).mean((1, 2, 3, 4))


@pytest.fixture
def flicker(monkeypatch):
    monkeypatch.setitem(LOSS_TERMS, "flicker", Flicker)


def objective(loss=None, **fields) -> Objective:
    loss = loss or {"denoising": {"weighting": {"name": "velocity", "min_sigma": 0.3}}}
    return Objective(
        Affine(),
        PROCESSES["rectified_flow"](prediction="x0"),
        TIME_SAMPLERS["uniform"](),
        build_loss_terms(loss),
        **fields,
    )


def batch(seed=0, shape=SHAPE):
    return {"latents": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


KINDS = [
    ({}, ClipTimes, 1),
    ({"first_frame": 0.5}, FirstFrameTimes, 2),
    ({"diffusion_forcing": True}, BlockTimes, 2),
]


@pytest.mark.parametrize(("fields", "strategy", "rank"), KINDS, ids=lambda v: str(v)[:20])
def test_the_loss_of_every_way_to_draw_times(fields, strategy, rank):
    """Against the formula, clip by clip and frame by frame, in float64."""
    made = objective(**fields)
    assert type(made.time_strategy) is strategy
    x0 = batch()["latents"]
    Affine.times.clear()
    got = jax.jit(made.losses)(PARAMS, batch(), KEY)
    assert {len(shape) for shape in Affine.times} == {rank}  # times of clips, or of frames
    times, noise, _ = jax.jit(made.draw)(x0, KEY)

    each, report = [], []
    for clip in range(CLIPS):
        errors = []
        for frame in range(FRAMES):
            t = float(times.t[clip, frame])
            x_t = (1 - t) * x0[clip, frame] + t * np.asarray(noise)[clip, frame]
            square = (0.7 * x_t - 0.2 - x0[clip, frame]) ** 2
            errors.append(square.mean() / max(t, 0.3) ** 2)
        if strategy is BlockTimes:
            each += errors
            report += list(np.asarray(times.t[clip]))
        else:
            learned = np.asarray(times.loss_mask[clip])
            each.append(np.mean(np.asarray(errors)[learned]))
            report.append(float(times.report_t[clip]))
    np.testing.assert_allclose(got.terms["denoising"], np.mean(each), rtol=1e-5)
    sums, _ = np.histogram(report, 5, (0, 1), weights=each)
    np.testing.assert_allclose(got.bin_sums, sums, rtol=1e-5)
    assert got.bin_counts.sum() == len(each)


def test_the_times_of_each_strategy():
    clip = objective().draw(batch()["latents"], KEY).times
    assert (clip.t == clip.report_t[:, None]).all() and clip.loss_mask.all()

    first = objective(first_frame=0.5).draw(batch()["latents"], KEY).times
    is_given = ~np.asarray(first.loss_mask[:, 0])
    assert 0 < is_given.sum() < CLIPS
    np.testing.assert_array_equal(first.report_t, clip.report_t)  # the same draw
    np.testing.assert_array_equal(first.t[:, 0], np.where(is_given, 0, clip.report_t))
    np.testing.assert_array_equal(first.t[:, 1:], clip.t[:, 1:])
    assert first.loss_mask[:, 1:].all()

    block = np.asarray(objective(diffusion_forcing=True).draw(batch()["latents"], KEY).times.t)
    assert (block[:, ::2] == block[:, 1::2]).all() and len(np.unique(block)) == CLIPS * 3


def test_an_image_has_no_given_frame():
    image = batch(shape=(CLIPS, 1, 2, 2, 3))["latents"]
    times = objective(first_frame=1.0).draw(image, KEY).times
    assert times.loss_mask.all() and (times.t > 0).all()


def terms_by_hand(made, params, data, key):
    """Each term's mean, from the formulas and the objective's draws."""
    x0 = data["latents"]
    times, noise, _ = made.draw(x0, key)
    t = times.report_t[:, None, None, None, None]
    prediction = params["scale"] * ((1 - t) * x0 + t * noise) + params["shift"]
    denoising = jnp.mean(((prediction - x0) / jnp.maximum(t, 0.3)) ** 2)
    flicker = jnp.mean((prediction[:, 1:] - prediction[:, :-1]) ** 2)
    return {"denoising": denoising, "flicker": flicker}


TWO = {
    "denoising": {"weight": 0.8, "weighting": {"name": "velocity", "min_sigma": 0.3}},
    "flicker": {"weight": 0.3},
}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_terms_and_their_shares_of_the_gradient(flicker, accumulate):
    made = objective(TWO)
    tx = optax.sgd(1.0)
    state = init_state(PARAMS, tx, seed=3)
    step = jax.jit(make_train_step(made, tx, 0.99, accumulate))
    new, metrics = step(state, batch())

    key = jax.random.fold_in(state.key, 0)
    parts = [(batch(), key)]
    if accumulate == 2:
        latents = batch()["latents"]
        parts = [({"latents": latents[i::2]}, jax.random.fold_in(key, i)) for i in range(2)]
    values, gradients = {}, {}
    for name, term in TWO.items():
        loss = lambda p, d, k, n=name: terms_by_hand(made, p, d, k)[n]
        by_hand = jax.jit(jax.value_and_grad(loss))
        of = [by_hand(PARAMS, d, k) for d, k in parts]
        values[name] = np.mean([value for value, _ in of])
        summed = [np.array([g["scale"], g["shift"]]) for _, g in of]
        gradients[name] = term["weight"] * np.mean(summed, axis=0)

    norms = {name: np.linalg.norm(g) for name, g in gradients.items()}
    for name in TWO:
        np.testing.assert_allclose(metrics[f"loss_{name}"], values[name], rtol=1e-5)
        share = norms[name] / sum(norms.values())
        np.testing.assert_allclose(metrics[f"gradient_share_{name}"], share, rtol=1e-5)
    total = 0.8 * values["denoising"] + 0.3 * values["flicker"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    gradient = sum(gradients.values())
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    moved = [new.params["scale"] - 0.7, new.params["shift"] + 0.2]
    np.testing.assert_allclose(moved, -gradient, rtol=1e-4)

    row = {name: np.asarray(value).tolist() for name, value in metrics.items()}
    logged = mean_losses([row, row])
    for name in TWO:
        assert logged[f"train/loss_{name}"] == row[f"loss_{name}"]
        assert logged[f"train/gradient_share_{name}"] == row[f"gradient_share_{name}"]


def test_one_term_logs_and_computes_nothing_more():
    made = objective()
    state = init_state(PARAMS, optax.sgd(1.0), seed=3)
    _, metrics = jax.eval_shape(make_train_step(made, optax.sgd(1.0), 0.99), state, batch())
    names = {"loss", "grad_norm", "ok", "accepted", "bin_sums", "bin_counts"}
    assert metrics.keys() == names


def test_microbatches_take_turns_through_the_batch():
    """Their average is that of the parts, each with a key of its own."""
    made = objective()
    gradients = jax.jit(
        lambda batch, key, count: accumulated_gradients(made, PARAMS, None, batch, key, count),
        static_argnums=2,
    )
    whole = gradients(batch(), KEY, 2)
    latents = batch()["latents"]
    parts = [gradients({"latents": latents[i::2]}, jax.random.fold_in(KEY, i), 1) for i in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *[part.gradients for part in parts])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole.gradients, mean)
    assert whole.losses.bin_counts.sum() == CLIPS


def test_a_loss_that_cannot_be_built(flicker):
    with pytest.raises(ConfigError, match=r"config\.loss has no term. Known: denoising"):
        build_loss_terms({})
    with pytest.raises(ConfigError, match=r"config\.loss: unknown name 'flickr'.*'flicker'"):
        build_loss_terms({"flickr": {}})
    with pytest.raises(ConfigError, match=r"config\.loss\.flicker\.wait.*Did you mean 'weight'"):
        build_loss_terms({"flicker": {"wait": 1.0}})
    with pytest.raises(ConfigError, match=r"config\.loss\.flicker = 0\.3: expected the fields"):
        build_loss_terms({"flicker": 0.3})
