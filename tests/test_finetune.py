"""Fine-tuning from files of weights: every config of Wan at a tiny size, what its checkpoints hold,
what stays frozen, and where a run starts and resumes."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.data.records import latent_features, write_records
from vdx.diffusion.losses import shared_times
from vdx.experiment import Experiment, load
from vdx.files import read_rows
from vdx.generate.generator import Sampling
from vdx.interop.keymap import WeightsError
from vdx.interop.lora import open_lora, write_lora
from vdx.interop.save import export_plan, save_folder
from vdx.interop.wan import load_wan
from vdx.interop.wan_config import wan_config
from vdx.interop.wan_keys import wan_transformer_rows
from vdx.models.adapters.lora import Adapted, adapt
from vdx.train import loop
from vdx.train.checkpoint import Checkpoints
from vdx.train.checkpoint_match import CheckpointError
from vdx.train.checksum import fingerprints
from vdx.train.compile import TrainProgram, train_program
from vdx.train.loop import TrainedRun, train
from vdx.train.objectives import Objective
from vdx.train.objectives.denoising import Draws
from vdx.train.objectives.times import give_first_frame
from vdx.train.preemption import PreemptionHandler
from vdx.train.start import start_state
from vdx.weights import open_params, open_trained

ROOT = Path(__file__).parents[1]
CONFIGS = ["wan21_t2v_1p3b", "wan21_t2v_1p3b_lora", "wan21_i2v_14b_lora", "wan22_ti2v_5b_lora"]
LORA = "wan21_t2v_1p3b_lora"
IMAGE = {"concat": (3, 8, 8, 8), "image_tokens": (7, 24)}
NULL = np.linspace(-1, 1, 16).astype(np.float32)


def write_data(path: Path, metadata=None, **signals) -> Path:
    """Cached latents [3 8 8 4] and text of up to five tokens, with what further signals read."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "latents": rng.normal(size=(3, 8, 8, 4)),
            "text": rng.normal(size=(1 + i % 5, 16)),
            "caption": f"clip {i}",
            "fps": 8.0,
            "num_frames": 9,
            "key": f"clip {i}",
            **{name: rng.normal(size=shape) for name, shape in signals.items()},
        }
        for i in range(24)
    ]
    return write_records(
        path,
        {"train": rows[:16], "validation": rows[16:]},
        latent_features((3, 8, 8, 4), 16, **signals),
        metadata={
            "latents": [3, 8, 8, 4],
            "text": [5, 16],
            **signals,
            **({"null": NULL.tolist()} if metadata is None else metadata),
        },
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory, randomise):
    """place(config) -> options of the command: random weights and data for it."""
    root, made = tmp_path_factory.mktemp("public"), {}
    data = {"": write_data(root / "data"), "i2v": write_data(root / "image_data", **IMAGE)}

    def options(name: str) -> list[str]:
        kind = "i2v" if "_i2v_" in name else ""
        if kind not in made:
            experiment = Experiment(resolve(f"{ROOT}/configs/{name}.py:smoke", []))
            made[kind] = root / f"weights_{kind}"
            save_weights(made[kind], experiment.model, randomise(experiment.shapes))
        return [f"--config.weights={made[kind]}", f"--config.data.path={data[kind]}"]

    return options


def save_weights(folder: Path, model, params) -> None:
    rows = wan_transformer_rows(model)
    shapes = {key: shape for key, (shape, _) in export_plan(params, rows).items()}
    save_folder(params, rows, wan_config(shapes, head_width=24), folder)


SHORT = ["--config.eval.loss=null", "--config.optim.warmup_steps=1"]


def experiment(name: str, *args: str) -> Experiment:
    return Experiment(resolve(f"{ROOT}/configs/{name}.py:smoke", [*SHORT, *args]))


def trained(made: Experiment, workdir: Path, mesh) -> TrainedRun:
    with jax.set_mesh(mesh):
        return train(made.job(), workdir, mesh, PreemptionHandler())


@pytest.fixture(scope="module")
def programs():
    """Equal configs have one program, which is traced and compiled once."""
    made: dict[str, TrainProgram] = {}

    def once(job, mesh):
        key = json.dumps(job.config)
        if key not in made:
            made[key] = train_program(job, mesh)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_program", once)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, place, mesh, programs):
    """runs(config) -> (workdir, TrainedRun) of four steps, each made once."""
    made: dict[str, tuple[Path, TrainedRun]] = {}

    def get(name: str) -> tuple[Path, TrainedRun]:
        if name not in made:
            workdir = tmp_path_factory.mktemp(name)
            made[name] = workdir, trained(experiment(name, *place(name)), workdir, mesh)
        return made[name]

    return get


def losses(workdir: Path) -> dict[int, float]:
    return {
        r["step"]: r["train/loss"]
        for r in read_rows(workdir / "metrics.jsonl")
        if "train/loss" in r
    }


def leaves(workdir: Path, step: int = 4) -> dict:
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.facts(step)["leaves"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == LORA else [pytest.mark.slow]) for name in CONFIGS],
)
def test_it_trains_from_files_of_weights(name, runs, place, mesh):
    workdir, run = runs(name)
    assert sorted(losses(workdir)) == [1, 2, 3, 4]
    assert np.isfinite(list(losses(workdir).values())).all()
    made = experiment(name, *place(name))
    read = load_wan(made.weights.path, made.model, mesh)
    if made.lora is None:  # all of it has moved from where it began, a little
        far = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), run.state.params, read)
        far["conditioning"]["embeddings"]["null"] = np.abs(
            run.state.params["conditioning"]["embeddings"]["null"] - NULL
        ).max()
        assert all(0 < d < 1e-3 for d in jax.tree.leaves(far))
        assert {str(x.dtype) for x in jax.tree.leaves(run.state.params)} == {"float32"}
        return
    with jax.set_mesh(mesh):  # none of it has, in any bit
        frozen = made.weights.read_weights(mesh)
        before, after = fingerprints(frozen), fingerprints(run.params.base)
    assert {k for k in before if before[k] != after[k]} == {"conditioning/embeddings/null"}
    np.testing.assert_array_equal(run.params.base["conditioning"]["embeddings"]["null"], NULL)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), frozen, read)
    assert {str(x.dtype) for x in jax.tree.leaves(frozen)} == {"bfloat16", "float32"}
    assert frozen["network"]["layers"]["block_0"]["full"]["q"]["kernel"].dtype == jnp.bfloat16
    moved = jax.tree.map(lambda b: float(np.abs(b).max()), run.state.params)
    assert all(d > 0 for d in jax.tree.leaves(moved))  # B too, which began at zero


def test_a_checkpoint_of_adapters_holds_nothing_else(runs):
    workdir, run = runs(LORA)
    paths = [path for path in leaves(workdir) if path.split("/")[0] in ("params", "ema")]
    assert len(paths) == 2 * 2 * 10 and all("/lora_" in path for path in paths)
    numbers = sum(np.prod(shape) for shape, *_ in leaves(workdir).values())
    assert numbers == sum(np.size(x) for x in jax.tree.leaves(run.state))
    adapters = sum(x.size for x in jax.tree.leaves(run.state.params))
    network = sum(x.size for x in jax.tree.leaves(run.params.base))
    assert numbers < 4 * adapters + 10 and adapters < 0.2 * network
    data = sum(
        f.stat().st_size
        for item in ("params", "ema")
        for f in (workdir / "checkpoints" / "4" / item).rglob("d/*")
    )
    assert data < 2 * 4 * adapters + 40_000 < 4 * network


def test_it_resumes_exactly(runs, place, mesh, tmp_path):
    """4 steps = 2 steps + the same command again, and other frozen weights are refused."""
    whole, _ = runs(LORA)
    halved = tmp_path / "halved"
    shutil.copytree(whole, halved)
    shutil.rmtree(halved / "checkpoints" / "4")
    shutil.copytree(halved, tmp_path / "other")
    trained(experiment(LORA, *place(LORA)), halved, mesh)
    assert leaves(halved) == leaves(whole) and losses(halved) == losses(whole)

    other = load_wan(experiment(LORA, *place(LORA)).weights.path, experiment(LORA).model, mesh)
    other["network"]["table"] = other["network"]["table"].at[0, 0].add(1e-3)
    save_weights(tmp_path / "weights", experiment(LORA).model, other)
    changed = experiment(LORA, *place(LORA), f"--config.weights={tmp_path / 'weights'}")
    with pytest.raises(CheckpointError, match="step 2 were trained with other frozen weights"):
        trained(changed, tmp_path / "other", mesh)


def test_a_run_starts_with_the_adapters_of_another(runs, place, mesh, tmp_path):
    first, run = runs(LORA)
    job = experiment(LORA, *place(LORA), f"--config.init={first}").job()
    with jax.set_mesh(mesh), Checkpoints(tmp_path) as checkpoints:
        abstract = train_program(job, mesh).abstract_state
        frozen = job.weights.open_frozen(mesh)
        again = start_state(job, tmp_path, mesh, checkpoints, abstract, frozen)
    assert again.progress is None and again.state.step == 0
    jax.tree.map(np.testing.assert_array_equal, again.state.params, run.state.ema)


def test_a_run_is_opened_to_draw_with(runs, mesh):
    workdir, run = runs(LORA)
    with jax.set_mesh(mesh):
        made = load(workdir)
        params, step, identity = open_params(made, workdir, mesh)
        raw, _, another = open_params(made, workdir, mesh, item="params")
    assert isinstance(params, Adapted) and step == 4 and identity != another
    assert params.scale == 8.0  # alpha 32 over the tiny rank 4
    jax.tree.map(np.testing.assert_array_equal, params.factors, run.state.ema)
    jax.tree.map(np.testing.assert_array_equal, raw.factors, run.state.params)
    batch = {"text": np.ones((1, 5, 16), np.float32), "text_mask": np.ones((1, 5), bool)}
    noise = np.random.default_rng(0).normal(size=(1, 3, 8, 8, 4)).astype(np.float32)
    draw = jax.jit(made.generator(Sampling("euler", steps=1, guidance=1.0)).draw)
    with_them, without = (
        draw(p, batch, noise, jax.random.key(0)[None])[0] for p in (params, params.base)
    )
    assert np.isfinite(with_them).all() and np.abs(with_them - without).max() > 1e-3


def test_adapters_of_a_run_go_out_as_a_file_and_come_back(runs, mesh, tmp_path):
    workdir, run = runs(LORA)
    made = load(workdir)
    with jax.set_mesh(mesh):
        factors, *_ = open_trained(made, workdir, mesh)
    write_lora(tmp_path / "lora.safetensors", factors, made.model, made.lora.scale)
    change = open_lora(tmp_path / "lora.safetensors", made.model)
    base = jax.tree.map(lambda x: x.astype(jnp.float32), run.params.base)
    got, want = (
        adapt(p, *c, merge=True) for p, c in ((base, [change]), (run.params.replace(base=base), []))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_the_averaged_weights_of_a_run_are_a_network_for_adapters(place, mesh, randomise, tmp_path):
    whole = experiment("wan21_t2v_1p3b", *place("wan21_t2v_1p3b"))
    params, average = (jax.tree.map(jnp.asarray, randomise(whole.shapes, seed)) for seed in (1, 2))
    with jax.set_mesh(mesh), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, whole.init_state(params).replace(ema=average), {})
    made = experiment(LORA, *place(LORA), f"--config.weights={tmp_path}")
    with jax.set_mesh(mesh):
        frozen = made.weights.with_null(made.weights.read_weights(mesh))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), frozen, average)


# Errors


def test_no_weights(place, mesh, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.weights is not set"):
        trained(experiment(LORA, *place(LORA), "--config.weights="), tmp_path, mesh)


def test_captions_are_not_dropped_for_nothing(place, mesh, tmp_path):
    bare = write_data(tmp_path / "data", metadata={})
    options = [*place(LORA), f"--config.data.path={bare}"]
    with pytest.raises(ConfigError, match=r"dropout = 0\.1 drops captions"):
        trained(experiment(LORA, *options), tmp_path / "run", mesh)
    made = experiment(LORA, *options, "--config.model.signals.embeddings.dropout=0")
    made.weights.with_null(made.weights.read_weights(mesh))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.backbone.heads=4", r"config\.model\.backbone: heads = 4, but the weights have 2$"),
        ("model.backbone.mlp_ratio=3.0", "hidden features = 144, but the weights have 96"),
        ("model.backbone.rope_theta=100.0", r"rope_theta = 100.0, but the weights have 10000.0"),
        ("model.signals.embeddings.length=None", "length = None, not 512"),
        ("model.signals.fps={}", "conditioning/fps/.*: not in the file"),
    ],
)
def test_a_model_that_is_not_that_of_the_weights(option, message, place, mesh):
    made = experiment(LORA, *place(LORA), f"--config.{option}")
    with pytest.raises(WeightsError, match=message):
        made.weights.read_weights(mesh)


# A given first frame (Wan 2.2 TI2V).


class Echo:
    """A network that predicts zero, and keeps its input and its times."""

    patch = (1, 1, 1)

    def run(self, params, x, time, batch, drop, method):
        self.x, self.time = x, time
        return jnp.zeros_like(x)

    def num_tokens(self, shape):
        return 1

    def random_drop(self, key, batch):
        return {}

    def from_clip(self, key, x0):
        return {}


def test_a_given_first_frame_is_clean_at_time_zero_and_not_learned():
    made = experiment("wan22_ti2v_5b_lora").objective
    network, rng = Echo(), np.random.default_rng(0)
    objective = Objective(network, made.process, made.time_sampler, made.loss_terms)
    x0, noise = (rng.normal(size=(2, 3, 2, 2, 4)).astype(np.float32) for _ in "ab")
    t, known = jnp.array([0.25, 0.5]), jnp.array([True, False])

    def losses(x0, noise):
        times = give_first_frame(shared_times(t, x0.shape[1]), known)
        return objective.term_losses({}, {}, x0, Draws(times, noise, {}))["denoising"]

    loss = losses(x0, noise)
    np.testing.assert_allclose(network.time, [[0, 250, 250], [500, 500, 500]])
    np.testing.assert_array_equal(network.x[0, 0], x0[0, 0])
    np.testing.assert_allclose(network.x[0, 1], 0.75 * x0[0, 1] + 0.25 * noise[0, 1], rtol=1e-6)
    square = (noise - x0) ** 2
    np.testing.assert_allclose(loss, [square[0, 1:].mean(), square[1].mean()], rtol=1e-5)
    image = losses(x0[:, :1], noise[:, :1])
    np.testing.assert_allclose(image, square[:, 0].mean((1, 2, 3)), rtol=1e-5)


def test_its_share_of_the_clips():
    made = experiment("wan22_ti2v_5b_lora").objective
    assert made.first_frame == 0.5
    network = Echo()
    objective = Objective(network, made.process, made.time_sampler, first_frame=0.25)
    objective.losses({}, {"latents": np.zeros((400, 2, 1, 1, 4), np.float32)}, jax.random.key(0))
    share = np.mean(np.asarray(network.time)[:, 0] == 0)
    assert 0.18 < share < 0.32 and (np.asarray(network.time)[:, 1] > 0).all()
