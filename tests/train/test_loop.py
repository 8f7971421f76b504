"""A batch with bad numbers changes nothing; a streak of them sends the run back, with new data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.loader import resolve
from vdx.experiment import Experiment
from vdx.files import read_rows
from vdx.parallel import put_batch
from vdx.train import loop
from vdx.train import step as step_module
from vdx.train.checkpoint import Checkpoints
from vdx.train.checksum import fingerprints
from vdx.train.compile import train_program
from vdx.train.loop import BadNumbers, PeriodicTask, train
from vdx.train.preemption import PreemptionHandler

STEPS, BATCH = 12, 2


class Latents:
    """Ready examples; those of the batches `bad` hold numbers that no network survives."""

    def __init__(self, bad: dict[int, float]):
        self.bad = bad

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        latents = rng.normal(size=(4, 4, 4, 4)).astype(np.float32)
        latents[0, 0, 0, 0] *= self.bad.get(index // BATCH, 1.0)
        return {
            "latents": latents,
            "text": rng.normal(size=(3, 32)).astype(np.float32),
            "text_mask": np.ones(3, bool),
            "fps": np.float32(8),
            "num_frames": np.int32(4),
            "key": f"clip {index}",
        }


def experiment(bad: dict[int, float], *overrides: str) -> Experiment:
    made = Experiment(
        resolve(
            "configs/t2v_base.py:smoke",
            [
                "--config.model.backbone.width=16",
                "--config.model.backbone.depth=1",
                "--config.model.backbone.heads=2",
                "--config.model.backbone.pattern=full",
                "--config.model.backbone.remat=none",
                f"--config.data.loader.global_batch={BATCH}",
                "--config.data.loader.shuffle=False",
                f"--config.train.steps={STEPS}",
                "--config.eval.loss=null",
                "--config.train.save_every=2",
                "--config.train.max_grad_norm_ratio=5",
                "--config.optim.warmup_steps=1",
                "--config.mesh.fsdp=1",
                *overrides,
            ],
        )
    )
    made.source = lambda validation=False: Latents(bad)
    return made


@pytest.fixture(scope="module")
def memory():
    """Norms can be spikes after three steps here; after a hundred in real runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "NORM_MEMORY", 3)
        yield


@pytest.fixture(scope="module")
def program(mesh, memory):
    """The program that `train` compiles: only the data differ between the runs of this file."""
    with jax.set_mesh(mesh):
        made = train_program(experiment({}).job(), mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_program", lambda job, mesh: made)
        yield made


@pytest.fixture(scope="module")
def step_fn(mesh, program):
    """The step that `train` takes, and its first state."""
    made = experiment({})
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
        state = jax.jit(made.init_state, out_shardings=shardings)()
    return program.step, state


def batches(bad: dict[int, float], mesh, *positions: int):
    source = Latents(bad)
    for p in positions:
        rows = [source[p * BATCH + i] for i in range(BATCH)]
        yield put_batch(mesh, {k: np.stack([r[k] for r in rows]) for k in rows[0]})


def run(step_fn, mesh, bad, *positions: int, state=None):
    step, first = step_fn
    # A copy: a step takes over the memory of its state.
    state, log = jax.tree.map(jnp.copy, first if state is None else state), []
    with jax.set_mesh(mesh):
        for batch in batches(bad, mesh, *positions):
            state, metrics = step(state, batch, None)
            log.append(jax.device_get(metrics))
        return state, log, fingerprints(state)


@pytest.fixture(scope="module")
def four_steps(step_fn, mesh):
    """(state, log, fingerprints) after four good batches."""
    return run(step_fn, mesh, {}, 0, 1, 2, 3)


@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf, 1e30, 1e6], ids=str)
def test_a_bad_batch_changes_no_bit(step_fn, four_steps, mesh, factor):
    state, _, before = four_steps
    _, log, after = run(step_fn, mesh, {4: factor}, 4, state=state)
    assert not log[0]["ok"]
    assert {k for k in before if before[k] != after[k]} == {"step"}


def test_a_good_batch_does(step_fn, four_steps, mesh):
    state, _, before = four_steps
    _, log, after = run(step_fn, mesh, {4: 1.5}, 4, state=state)
    assert log[0]["ok"] and log[0]["accepted"] == 5
    changed = {k for k in before if before[k] != after[k]}
    assert changed >= {"step", "accepted", "norm"} and len(changed) > 20


def test_a_spike_passes_while_the_mean_is_not_known(step_fn, mesh):
    _, log, _ = run(step_fn, mesh, {1: 1e4}, 0, 1)
    assert log[1]["ok"] and log[1]["grad_norm"] > 5 * log[0]["grad_norm"]


def trained(made, mesh, workdir, **tasks):
    workdir.mkdir(exist_ok=True)
    with jax.set_mesh(mesh), PreemptionHandler() as preemption:
        state = train(made.job(), workdir, mesh, preemption, **tasks).state
        return state, fingerprints(state)


def test_two_bad_batches_are_refused_and_named(step_fn, mesh, tmp_path):
    """And periodic tasks run, evaluations before samples, with scores in the log."""
    calls = []

    def task(name, every, scores):
        return PeriodicTask(name, every, lambda step, _: calls.append((name, step)) or scores)

    _, got = trained(
        experiment({5: np.nan, 7: np.inf}, "--config.train.save_every=6"),
        mesh,
        tmp_path / "run",
        evaluations=[task("one", 8, {"a": 1.0}), task("two", 5, {"b": 2.0}), task("off", 0, {})],
        samples=[task("draw", 5, {})],
    )
    due = [(5, ["two", "draw"]), (8, ["one"]), (10, ["two", "draw"]), (12, ["one", "two", "draw"])]
    assert calls == [(name, step) for step, names in due for name in names]
    _, _, want = run(step_fn, mesh, {5: np.nan, 7: np.inf}, *range(STEPS))
    assert got == want
    rows = read_rows(tmp_path / "run" / "refused_batches.jsonl")
    assert [(r["step"], r["position"], r["keys"]) for r in rows] == [
        (6, 5, ["clip 10", "clip 11"]),
        (8, 7, ["clip 14", "clip 15"]),
    ]
    logged = read_rows(tmp_path / "run" / "metrics.jsonl")
    scores = {row["step"]: (row.get("a"), row.get("b")) for row in logged if {"a", "b"} & set(row)}
    assert scores == {5: (None, 2.0), 8: (1.0, None), 10: (None, 2.0), 12: (1.0, 2.0)}
    assert [row["train/refused"] for row in logged if "train/refused" in row][-1] == 2
    assert all(np.isfinite(r["train/loss"]) for r in logged if "train/loss" in r)


@pytest.mark.slow
def test_a_streak_goes_back_and_takes_new_data(step_fn, mesh, tmp_path):
    """Steps 6, 7 and 8 are refused: back to step 4, then the batches that follow."""
    bad = dict.fromkeys((5, 6, 7), np.nan)
    state, got = trained(experiment(bad), mesh, tmp_path / "run")
    back, _, _ = run(step_fn, mesh, {}, 0, 1, 2, 3)
    want, _, numbers = run(step_fn, mesh, {}, *range(8, 8 + STEPS - 4), state=back)
    assert got == numbers
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * float(jnp.abs(b).max() + 1e-3))
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        progress = checkpoints.facts(STEPS)["progress"]
    assert progress["position"] == 8 + STEPS - 4 and progress["rollbacks"] == 1


@pytest.mark.slow
def test_when_going_back_does_not_help(mesh, program, tmp_path):
    workdir, bad = tmp_path / "run", dict.fromkeys(range(5, 400), np.nan)
    with pytest.raises(BadNumbers) as error:
        # Without a log there is nothing to write, and no interval to divide by.
        trained(experiment(bad, "--config.train.log_every=0"), mesh, workdir)
    assert "batches in a row" in str(error.value) and "after going back 2 times" in str(error.value)
    rows = read_rows(workdir / "refused_batches.jsonl")
    assert len(rows) >= 9 and f"batch {rows[-1]['position']}: {rows[-1]['keys'][0]}" in str(
        error.value
    )
    with jax.set_mesh(mesh), Checkpoints(workdir, read_only=True) as checkpoints:
        assert 4 in checkpoints.steps()  # of before the streak


@pytest.mark.slow
def test_a_streak_before_the_first_save_begins_anew(mesh, program, tmp_path):
    trained(experiment(dict.fromkeys((0, 1, 2), np.nan)), mesh, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == STEPS and rows[-1]["train/refused"] == 0
