"""Training a part of a network: motion modules of an image model from files of weights."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.data.records import latent_features, write_records
from vdx.experiment import Experiment, load
from vdx.files import read_rows
from vdx.interop.unet import load_unet, save_unet
from vdx.models.adapters.trainable import Trainable
from vdx.models.denoiser import Denoiser
from vdx.models.shapes import new_shapes
from vdx.train.checkpoint import Checkpoints
from vdx.train.checkpoint_match import CheckpointError
from vdx.train.loop import TrainedRun, train
from vdx.train.preemption import PreemptionHandler
from vdx.types import Ports
from vdx.weights import open_params

ROOT = Path(__file__).parents[3]
NULL = np.linspace(-1, 1, 77 * 16).reshape(77, 16).astype(np.float32)
TREE = {"a": {"kernel": 1, "bias": 2}, "b": {"motion": {"kernel": 3}}}


def experiment(*args: str) -> Experiment:
    return Experiment(
        resolve(
            f"{ROOT}/configs/motion_module_sd15.py:smoke",
            [
                "--config.eval.loss=null",
                "--config.optim.warmup_steps=1",
                "--config.model.backbone.widths=(16,)",
                "--config.model.backbone.attention=(False,)",
                "--config.model.backbone.remat='none'",
                *args,
            ],
        )
    )


def image_model() -> Denoiser:
    made = experiment()
    return Denoiser({**made.model.backbone_config, "temporal": "none"}, made.model.signals)


@pytest.fixture(scope="module")
def place(tmp_path_factory, randomise) -> tuple[str, ...]:
    """Options of the command: an image model with random weights, and data."""
    root, rng = tmp_path_factory.mktemp("public"), np.random.default_rng(0)
    shapes = new_shapes(image_model())
    save_unet(randomise(shapes), image_model(), root / "unet")
    rows = [
        {
            "latents": rng.normal(size=(3, 4, 4, 4)),
            "text": rng.normal(size=(77, 16)),
            "caption": f"clip {i}",
            "fps": 8.0,
            "num_frames": 3,
            "key": f"clip {i}",
        }
        for i in range(24)
    ]
    write_records(
        root / "data",
        {"train": rows[:16], "validation": rows[16:]},
        latent_features((3, 4, 4, 4), 16),
        metadata={"latents": [3, 4, 4, 4], "text": [77, 16], "null": NULL.tolist()},
    )
    return f"--config.weights={root / 'unet'}", f"--config.data.path={root / 'data'}"


def trained(made: Experiment, workdir: Path, mesh) -> TrainedRun:
    with jax.set_mesh(mesh):
        return train(made.job(), workdir, mesh, PreemptionHandler())


@pytest.fixture(scope="module")
def fresh():
    """What is trained, as it begins."""
    return jax.jit(experiment().new_params)(jax.random.key(0))


@pytest.fixture(scope="module")
def first(place, mesh, tmp_path_factory) -> tuple[Path, TrainedRun]:
    workdir = tmp_path_factory.mktemp("run")
    return workdir, trained(experiment(*place), workdir, mesh)


def facts(workdir: Path, step: int = 4) -> dict:
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.facts(step)["leaves"]


def test_split_and_combine():
    frozen, trained = Trainable("motion").split(TREE)
    assert frozen == {"a": TREE["a"]} and trained == {"b": TREE["b"]}
    assert Trainable("motion").combine(frozen, trained) == TREE
    assert Trainable("motion").combine(TREE, {"b": {"motion": {"kernel": 4}}})["b"] == {
        "motion": {"kernel": 4}
    }


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere", r"'nowhere' finds none of the parameters.*\n  a\n  b/motion"),
        ("a|b", "finds all of the parameters. To train all of them leave it out"),
        ("(", "is no regex"),
    ],
)
def test_a_part_that_cannot_be_meant(pattern, message):
    with pytest.raises(ConfigError, match=message):
        Trainable(pattern).check(TREE)


def test_adapters_and_a_part_at_once():
    with pytest.raises(ConfigError, match=r"config\.lora and config\.trainable: set one"):
        experiment("--config.lora.rank=2", "--config.lora.targets=['q/kernel$']")


@pytest.mark.slow
def test_at_first_it_is_the_image_model(place, mesh, fresh):
    """Every frame of a clip, in every bit."""
    made = experiment(*place, "--config.model.backbone.dtype='float32'")
    frozen, given = made.weights.read_frozen(mesh)
    assert not given
    params = made.objective.network_params(fresh, frozen)
    image = image_model()
    image = Denoiser({**image.backbone_config, "dtype": "float32"}, image.signals)
    rng = np.random.default_rng(1)
    x, tokens = rng.normal(size=(1, 3, 4, 4, 4)), rng.normal(size=(1, 77, 16))
    x, ports = x.astype(np.float32), Ports(tokens=jnp.float32(tokens))
    got, want = (
        jax.jit(m.run)(p, x, jnp.array([500.0]), ports)
        for m, p in ((made.model, params), (image, frozen))
    )
    assert np.std(want) > 0.1
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_the_rest_is_frozen_and_in_no_checkpoint(first, fresh, place, mesh):
    workdir, run = first
    made = experiment(*place)
    read, own = (
        load_unet(made.weights.path, image_model(), mesh, "bfloat16"),
        flatten_dict(run.params, sep="/"),
    )
    for path, leaf in flatten_dict(read, sep="/").items():
        want = NULL if path.endswith("null") else leaf
        np.testing.assert_array_equal(own[path], want, err_msg=path)
        assert own[path].dtype == leaf.dtype
    paths = [path for path in facts(workdir) if path.split("/")[0] in ("params", "ema")]
    state = flatten_dict(run.state.params, sep="/")
    assert len(paths) == 2 * len(state) and all("/motion/" in path for path in paths)
    assert set(state) == {path for path in own if "/motion/" in path}
    # Parameters before a projection that began at zero move from the second step on.
    began = flatten_dict(fresh, sep="/")
    assert all(np.abs(leaf - began[path]).max() > 0 for path, leaf in state.items())
    losses = [
        row["train/loss"] for row in read_rows(workdir / "metrics.jsonl") if "train/loss" in row
    ]
    assert len(losses) == 4 and np.isfinite(losses).all()


@pytest.mark.slow
def test_it_resumes_exactly_and_with_the_same_weights_only(first, place, mesh, tmp_path, randomise):
    whole, _ = first
    shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
    shutil.copytree(tmp_path / "half", tmp_path / "other")
    trained(experiment(*place), tmp_path / "half", mesh)
    assert facts(tmp_path / "half") == facts(whole)
    shapes = new_shapes(image_model())
    save_unet(randomise(shapes, 1), image_model(), tmp_path / "unet")
    with pytest.raises(CheckpointError, match="step 2 were trained with other frozen weights"):
        trained(
            experiment(*place, f"--config.weights={tmp_path / 'unet'}"), tmp_path / "other", mesh
        )


@pytest.mark.slow
def test_it_goes_out_as_an_adapter_and_comes_back(first, place, mesh, tmp_path):
    """In a folder next to the image model's, it is what the next run begins with."""
    workdir, run = first
    with jax.set_mesh(mesh):
        params, step, _ = open_params(load(workdir), workdir, mesh)
    assert step == 4
    averaged = flatten_dict(run.state.ema, sep="/")
    read = flatten_dict(params, sep="/")
    assert all(np.array_equal(read[k], v) for k, v in averaged.items())
    # It comes from the data alone. Guidance leads away from dropped captions.
    np.testing.assert_array_equal(read["conditioning/embeddings/null"], NULL)
    made = experiment(*place)
    save_unet(run.state.ema, made.model, tmp_path / "motion", part="motion")
    both = (made.weights.path, str(tmp_path / "motion"))
    _, given = experiment(*place, f"--config.weights={both}").weights.read_frozen(mesh)
    given = flatten_dict(given, sep="/")
    assert set(given) == set(averaged)
    for path, leaf in averaged.items():
        np.testing.assert_array_equal(given[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.backbone.heads=4", "heads x width .*4.* at width 16, but the weights have"),
        ("model.backbone.groups=4", "groups = 4, but the weights have 8"),
        ("model.backbone.widths=(24,)", r"widths = \(24,\), but the weights have \(16,\)"),
        ("model.signals.embeddings.project=True", "project = True, not False"),
        ("trainable='/time/'", "motion/proj_in/kernel .*: not in the file"),
    ],
)
def test_a_model_that_is_not_that_of_the_weights(option, message, place, mesh):
    with pytest.raises(ValueError, match=message):
        experiment(*place, f"--config.{option}").weights.read_weights(mesh)
