"""Checkpoints give back the bits that were saved, on any mesh, or an error with the reason."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdx.parallel import MeshSpec
from vdx.train.checkpoint import Checkpoints, locate
from vdx.train.checkpoint_match import CheckpointError
from vdx.train.checksum import fingerprint, fingerprints
from vdx.train.state import TrainState, state_shardings

PROGRESS = {"position": 7, "window": [{"loss": 0.1}], "bad": [], "rollbacks": 0}


def new_state(seed: int = 0, width: int = 256) -> TrainState:
    """A state with every kind of leaf, without a network."""
    rng = np.random.default_rng(seed)
    array = lambda *shape: rng.standard_normal(shape, np.float32)
    params = {
        "mlp": {
            "up": {"kernel": array(3, 8, width), "bias": array(width)},
            "down": {"kernel": array(3, width, 8)},
        },
        "norm": {"scale": array(5)},
    }
    moments = jax.tree.map(
        lambda p: p + rng.integers(1, 9, p.shape).astype(p.dtype), optax.adamw(1e-3).init(params)
    )
    return TrainState(
        np.int32(seed),
        params,
        moments,
        jax.tree.map(lambda x: x + 1, params),
        jax.random.key(seed),
        np.float32(0.5),
        np.int32(4),
    )


def on(mesh, state: TrainState) -> TrainState:
    return jax.tree.map(jax.device_put, state, state_shardings(mesh, state))


def abstract(mesh, state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings(mesh, state),
    )


def same(a, b) -> None:
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        x, y = (
            jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v
            for v in (x, y)
        )
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@pytest.fixture(scope="module")
def mesh():
    return MeshSpec(data=1, fsdp=4, tensor=2).make()


@pytest.fixture(scope="module")
def one():
    return MeshSpec().make(jax.devices()[:1])


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory) -> Path:
    """Steps 1, 2 and 3, of states with those seeds, saved from eight devices."""
    workdir = tmp_path_factory.mktemp("saved")
    with jax.set_mesh(mesh), Checkpoints(workdir, max_to_keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, on(mesh, new_state(step)), PROGRESS)
    return workdir


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def restored(mesh, workdir, **options):
    with jax.set_mesh(mesh), Checkpoints(workdir, **options) as checkpoints:
        return checkpoints.restore(abstract(mesh, new_state()))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4}, marks=pytest.mark.slow),
        {"data": 2, "tensor": 2},
        {},
    ],
    ids=str,
)
def test_a_step_comes_back_on_any_mesh(saved, sizes):
    spec = MeshSpec(**{"data": 1, **sizes})
    count = int(np.prod([*sizes.values(), 1]))
    there = spec.make(jax.devices()[:count])
    state, progress = restored(there, saved, read_only=True)
    same(state, new_state(3))
    assert progress == PROGRESS
    assert state.params["mlp"]["up"]["kernel"].sharding.mesh == there


def test_progress_is_that_of_when_the_save_began(one, tmp_path, monkeypatch):
    rows, given = [{"loss": 0.1}], []
    with jax.set_mesh(one), Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(
            checkpoints.manager,
            "save",
            lambda step, args, **_: given.append(args["facts"].item) or True,
        )
        checkpoints.save(1, on(one, new_state(1)), {**PROGRESS, "window": rows})
        rows.append({"loss": 0.2})  # the next step; Orbax has not written the one before yet
    assert given[0]["progress"] == PROGRESS


@pytest.mark.parametrize("item", ["ema", "params"])
def test_weights_alone(saved, one, item):
    like = abstract(one, new_state()).params
    with jax.set_mesh(one), Checkpoints(saved, read_only=True) as checkpoints:
        got, step, identity = checkpoints.restore_params(like, item)
        same(got, getattr(new_state(3), item))
        older, two, other = checkpoints.restore_params(like, item, step=2)
        same(older, getattr(new_state(2), item))
        assert (step, two) == (3, 2) and identity != other
        assert identity == checkpoints.restore_params(like, item)[2]
        with pytest.raises(CheckpointError, match="holds no step 9; it holds 1, 2, 3"):
            checkpoints.restore_params(like, item, step=9)


# Fingerprints


def test_a_fingerprint_is_the_same_on_every_mesh(mesh, one):
    state = new_state(5)
    with jax.set_mesh(mesh):
        many = fingerprints(on(mesh, state))
    with jax.set_mesh(one):
        assert fingerprints(on(one, state)) == many
    assert len(set(many.values())) > 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_any_flipped_bit_changes_the_fingerprint(dtype):
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(rng.integers(0, 2, (6, 10)), dtype))
    base, print_of = int(fingerprint(jnp.asarray(x))), jax.jit(fingerprint)
    bits = 1 if dtype == "bool" else x.dtype.itemsize * 8
    for _ in range(40):
        flipped = x.copy()
        view = flipped.view(np.uint8).reshape(-1)
        bit = rng.integers(x.size * bits)
        byte, inside = divmod(bit, bits if dtype == "bool" else 8)
        view[byte] ^= np.uint8(1 << inside)
        assert int(print_of(jnp.asarray(flipped))) != base
    assert int(print_of(jnp.asarray(x))) == base


def test_swapped_values_change_the_fingerprint():
    x = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    assert len({int(fingerprint(y)) for y in (x, x.T, x[::-1], x[:, ::-1])}) == 4


# Damage


def array_files(step: Path) -> list[Path]:
    """Where the numbers are; the small files are descriptions, some of them written twice."""
    return sorted(p for p in step.rglob("*") if p.parent.name == "d" and p.stat().st_size > 2000)


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_flipped_bits_are_found_and_answered(saved, one, tmp_path, caplog):
    """12 flips in the files of the arrays and of the facts: each is found and named, and the
    older step takes its place; or it changed no value, in the copies that OCDBT leaves behind."""
    rng, found, harmless = random.Random(0), 0, 0
    while found < 12:
        work = Path(shutil.copytree(saved, tmp_path / f"{found}_{harmless}"))
        step = work / "checkpoints" / "3"
        files = [*array_files(step), step / "facts" / "metadata"]
        flip(*rng.choices(files, [f.stat().st_size for f in files]), rng)
        caplog.clear()
        state, _ = restored(one, work)
        seed = int(state.step)
        same(state, new_state(seed))
        if seed == 3:
            harmless += 1
            continue
        assert seed == 2 and f"{step} is damaged" in caplog.text
        assert (work / "damaged" / "3").is_dir() and not step.exists()
        found += 1
        shutil.rmtree(work)
    print(f"\n12 flips found, {harmless} changed no value")
    assert harmless < 12


def test_the_damaged_array_is_named(copy, one, caplog):
    """The values of one array, altered so that every checksum of Orbax still fits."""
    with jax.set_mesh(one), Checkpoints(copy) as checkpoints:
        facts = checkpoints.facts(3)
    path = copy / "checkpoints/3/facts/metadata"
    text = path.read_text()
    wrong = facts["leaves"]["ema/mlp/up/bias"][2]
    assert text.count(str(wrong)) == 1
    changed = json.loads(text)
    changed["leaves"]["ema/mlp/up/bias"][2] = wrong ^ 1
    changed.pop("sha256")
    from vdx.train.checksum import digest

    path.write_text(json.dumps({**changed, "sha256": digest(changed)}))
    state, _ = restored(one, copy)
    assert int(state.step) == 2
    assert "1 arrays are not what was saved: ema/mlp/up/bias" in caplog.text


@pytest.mark.parametrize("harm", ["truncated", "empty", "missing", "no facts", "no folder"])
def test_files_that_are_short_or_gone(copy, one, harm, caplog):
    step = copy / "checkpoints" / "3"
    target = max(array_files(step), key=lambda p: p.stat().st_size)
    match harm:
        case "truncated":
            os.truncate(target, target.stat().st_size // 2)
        case "empty":
            os.truncate(target, 0)
        case "missing":
            target.unlink()
        case "no facts":
            shutil.rmtree(step / "facts")
        case "no folder":
            shutil.rmtree(step / "ema")
    state, _ = restored(one, copy)
    same(state, new_state(2))
    assert f"{step} is damaged" in caplog.text


def test_another_runs_workdir_is_not_touched(copy, one, caplog):
    shutil.rmtree(copy / "checkpoints" / "3" / "facts")
    state, _ = restored(one, copy, read_only=True)
    assert int(state.step) == 2 and (copy / "checkpoints" / "3").exists()
    assert "is damaged" in caplog.text and not (copy / "damaged").exists()


def test_when_none_verifies(copy, one):
    for step in (1, 2, 3):
        shutil.rmtree(copy / "checkpoints" / str(step) / "rest")
    with pytest.raises(CheckpointError, match=r"None of the steps \[3, 2, 1\]"):
        restored(one, copy)


def test_a_step_can_be_saved_again_after_damage(copy, one):
    shutil.rmtree(copy / "checkpoints" / "3" / "ema")
    with jax.set_mesh(one), Checkpoints(copy) as checkpoints:
        state, _ = checkpoints.restore(abstract(one, new_state()))
        assert int(state.step) == 2
        checkpoints.save(3, on(one, new_state(3)), PROGRESS)
    same(restored(one, copy)[0], new_state(3))


# Another model's


def test_every_array_that_differs_is_named(saved, one):
    other = new_state(width=128)
    other.params["extra"] = {"kernel": np.zeros((2, 2), np.float32)}
    other = other.replace(accepted=np.float32(0))
    del other.ema["norm"]
    # The shardings of a tree whose parts differ are not the point here.
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=state_shardings(one, new_state()).step
        ),
        other,
    )
    with (
        jax.set_mesh(one),
        Checkpoints(saved, read_only=True) as checkpoints,
        pytest.raises(CheckpointError) as error,
    ):
        checkpoints.restore(like)
    for part in (
        "params/mlp/up/kernel float32(3, 8, 256): this model has float32(3, 8, 128)",
        "params/extra/kernel (2, 2): not in the checkpoint",
        "ema/norm/scale (5,): not in this model",
        "rest/accepted int32(): this model has float32()",
    ):
        assert part in str(error.value), str(error.value)
    assert (saved / "checkpoints" / "3").exists()  # nothing is wrong with it


# What is kept


def test_newest_every_and_best_compose_and_survive_restarts(tmp_path, one):
    scores = {1: 0.9, 2: 0.1, 3: 0.8, 4: 0.7, 5: 0.6, 6: 0.5, 7: 0.4}
    options = dict(max_to_keep=1, keep_period=3, best_metric="validation/loss")
    with jax.set_mesh(one):
        for steps in ((1, 2, 3), (4, 5), (6, 7)):  # three programs
            with Checkpoints(tmp_path, **options) as checkpoints:
                for step in steps:
                    checkpoints.save(
                        step, on(one, new_state(step)), PROGRESS, {"validation/loss": scores[step]}
                    )
        with Checkpoints(tmp_path, **options) as checkpoints:
            assert checkpoints.steps() == [2, 3, 6, 7] and checkpoints.best_step() == 2
        with Checkpoints(tmp_path, best_metric="validation/loss", read_only=True) as checkpoints:
            assert checkpoints.best_step() == 2
        with (
            Checkpoints(tmp_path, read_only=True) as checkpoints,
            pytest.raises(CheckpointError, match=r"set config\.train\.best"),
        ):
            checkpoints.best_step()


def test_a_step_without_a_score_is_not_best_and_not_kept_for_it(tmp_path, one):
    with jax.set_mesh(one), Checkpoints(tmp_path, max_to_keep=1, best_metric="m") as checkpoints:
        for step, metrics in ((1, {"m": 2.0}), (2, None), (3, {"m": 3.0}), (4, {"n": 0.0})):
            checkpoints.save(step, on(one, new_state(step)), PROGRESS, metrics)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 4] and checkpoints.best_step() == 1


def test_a_save_that_does_not_happen_is_an_error(saved, copy, one):
    with jax.set_mesh(one), Checkpoints(copy, max_to_keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match=r"Step 2 was not saved: .* already holds step 3"):
            checkpoints.save(2, on(one, new_state(2)), PROGRESS)
        checkpoints.delete_after(1)
        assert checkpoints.steps() == [1]
        checkpoints.save(2, on(one, new_state(2)), PROGRESS)
        checkpoints.delete_after(1)  # while it is written
        checkpoints.wait()
        assert checkpoints.steps() == [1]


def test_leaving_waits_for_the_save(tmp_path, one):
    with jax.set_mesh(one), pytest.raises(KeyError), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, on(one, new_state(1)), PROGRESS)
        raise KeyError("something else went wrong")
    same(restored(one, tmp_path)[0], new_state(1))


# Disks


def mounted(path: Path, options: str):
    path.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    mounted(disk, "size=1m")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_explained_and_older_steps_stay(small_disk, one):
    with jax.set_mesh(one):
        with Checkpoints(small_disk, max_to_keep=3) as checkpoints:
            checkpoints.save(1, on(one, new_state(1)), PROGRESS)
        free = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(b"x" * (free - 4096))
        with (
            pytest.raises(CheckpointError) as error,
            Checkpoints(small_disk, max_to_keep=3) as checkpoints,
        ):
            checkpoints.save(2, on(one, new_state(2)), PROGRESS)
        assert "No space left" in str(error.value) and "whole there: 1." in str(error.value)
        (small_disk / "filler").unlink()
        same(restored(one, small_disk)[0], new_state(1))
        with Checkpoints(small_disk, max_to_keep=3) as checkpoints:
            checkpoints.save(2, on(one, new_state(2)), PROGRESS)
        same(restored(one, small_disk)[0], new_state(2))


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("runs/a", ("runs/a", None)),
        ("runs/a/checkpoints", ("runs/a", None)),
        ("runs/a/checkpoints/500", ("runs/a", 500)),
        ("runs/500", ("runs/500", None)),
    ],
)
def test_locate(path, want):
    assert locate(path) == (Path(want[0]), want[1])


def test_no_checkpoint_at_all(tmp_path, one):
    assert restored(one, tmp_path) is None
    with pytest.raises(CheckpointError, match="Train there first"):
        Checkpoints(tmp_path / "nothing", read_only=True)
