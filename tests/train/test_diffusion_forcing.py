"""Diffusion forcing: a time for each block in training, and a config that trains and streams so."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.diffusion.losses import DenoisingLoss
from vdx.diffusion.process import PROCESSES
from vdx.diffusion.time_sampling import TIME_SAMPLERS
from vdx.experiment import Experiment, load
from vdx.files import read_rows
from vdx.generate.blockwise import BlockwiseGenerator
from vdx.generate.generator import Generator
from vdx.main import run
from vdx.models.denoiser import Denoiser
from vdx.train.objectives import Objective
from vdx.train.preemption import PreemptionHandler
from vdx.weights import open_params

RNG = np.random.default_rng(0)
SHAPE = (4, 4, 3)


def objective_of(spec, patch=(1, 2, 2), **fields):
    model = Denoiser(
        {
            "name": "transformer",
            "width": 24,
            "depth": 1,
            "heads": 2,
            "patch": patch,
            "pattern": ({"name": "full", **spec},),
        },
        {"fps": {}},
    )
    return Objective(
        model,
        PROCESSES["rectified_flow"](),
        TIME_SAMPLERS["uniform"](),
        diffusion_forcing=True,
        **fields,
    )


@pytest.mark.parametrize(("spec", "pt", "size"), [({"block": 2}, 2, 4), ({}, 2, 2), ({}, 1, 1)])
def test_every_block_has_its_own_time(spec, pt, size):
    objective = objective_of(spec, (pt, 2, 2))
    x0 = np.zeros((3, 10, *SHAPE), np.float32)
    times, noise, _ = jax.jit(objective.draw)(x0, jax.random.key(0))
    t = times.t
    assert t.shape == times.compact_t.shape == times.report_t.shape == (3, 10)
    assert noise.shape == x0.shape and times.loss_mask.all()
    for clip in np.asarray(t):
        parts = [clip[i : i + size] for i in range(0, 10, size)]
        assert all(len(set(part.tolist())) == 1 for part in parts)
        assert len({part[0] for part in parts}) == len(parts)
    assert t.min() > 0 and t.max() < 1 and t.max() - t.min() > 0.7


class TimeEcho:
    """A model that predicts its own time, in every pixel."""

    def __init__(self, model):
        for name in ("num_tokens", "backbone", "random_drop", "from_clip", "block"):
            setattr(self, name, getattr(model, name))

    def run(self, params, x, time, batch, drop, method):
        return jnp.broadcast_to(time[:, :, None, None, None], x.shape) / 1000


def test_the_loss_of_a_frame_is_that_at_its_time():
    objective = objective_of({"block": 2})
    echo = dataclasses.replace(
        objective,
        model=TimeEcho(objective.model),
        loss_terms={"denoising": DenoisingLoss(weighting={"name": "velocity"})},
        process=PROCESSES["rectified_flow"](prediction="x0"),
    )
    x0 = RNG.normal(size=(3, 6, *SHAPE)).astype(np.float32)
    t = jax.jit(echo.draw)(x0, jax.random.key(1)).times.t
    each = np.asarray(t)[:, :, None, None, None]
    errors = np.square((each - x0) / np.maximum(each, 0.05)).mean((2, 3, 4))
    losses = jax.jit(echo.losses)({}, {"latents": x0}, jax.random.key(1))
    np.testing.assert_allclose(losses.terms["denoising"], errors.mean(), rtol=1e-5)
    np.testing.assert_array_equal(losses.bin_counts, np.histogram(t, 5, (0, 1))[0])
    sums = np.histogram(t, 5, (0, 1), weights=errors)[0]
    np.testing.assert_allclose(losses.bin_sums, sums, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"first_frame = 0\.5 sets times"):
        dataclasses.replace(objective, first_frame=0.5)


MICRO = [
    "--config.train.steps=4",
    "--config.eval={'loss': {'every': 4, 'clips': 8}}",
    "--config.train.sample_every=4",
    "--config.train.save_every=4",
    "--config.train.log_every=2",
    "--config.data.loader.global_batch=8",
    "--config.sample.steps=2",
    "--config.model.backbone.width=32",
    "--config.model.backbone.depth=2",
    "--config.model.backbone.heads=2",
    "--config.train.sample_prompts=('a red circle moves right',)",
]


def test_a_config_with_forcing_and_blocks_streams(at_root):
    config = resolve("configs/t2v_tiny.py:stream", MICRO)
    assert isinstance(Experiment(config).generator(), BlockwiseGenerator)
    assert type(Experiment({**config, "diffusion_forcing": False}).generator()) is Generator
    config["model"]["backbone"]["pattern"][0]["block"] = 3
    with pytest.raises(ConfigError, match=r"16 frames are no number of blocks.* of 12"):
        Experiment(config).tx  # noqa: B018


@pytest.mark.slow
def test_it_trains_and_draws_clips_longer_than_those_of_training(at_root, tmp_path):
    run(resolve("configs/t2v_tiny.py:stream", MICRO), tmp_path, PreemptionHandler())
    rows = [r for r in read_rows(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in rows] == [2, 4]
    assert all(np.isfinite(r["train/loss"]) for r in rows)
    experiment = load(tmp_path)
    mesh = experiment.mesh_spec.make()
    with jax.set_mesh(mesh):
        params, *_ = open_params(experiment, tmp_path, mesh)
        request = params, ["a red ball", "blue"], [5, 6]
        clip = experiment.generator()(*request, num_frames=64, fps=8.0)
        blocks = list(
            itertools.islice(experiment.generator().stream(*request, num_frames=None, fps=8.0), 3)
        )
    assert clip.shape == (2, 64, 32, 32, 3) and np.isfinite(clip).all()
    np.testing.assert_allclose(np.concatenate(blocks, 1), clip[:, :12], atol=1e-4)
