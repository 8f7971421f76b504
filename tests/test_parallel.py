"""Every mesh computes what one device computes; on eight simulated devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from vdx.config.loader import resolve
from vdx.experiment import Experiment
from vdx.models.shapes import new_shapes
from vdx.parallel import AXES, MeshSpec, constrain, param_shardings, path_str, put_batch, replicated
from vdx.train.state import TrainState, state_shardings
from vdx.train.step import make_train_step

# Mesh shape -> axis -> collectives, one of which the compiled step must have along that axis.
# Weights are gathered over fsdp, gradients summed over data, partial products over tensor; what
# XLA does to exchange shares of the token grid is its own choice.
MOVE = {"all-to-all", "all-gather", "collective-permute"}
GATHER, REDUCE = {"all-gather"}, {"all-reduce", "reduce-scatter"}
MESHES = {
    "data8": {"data": (8, REDUCE)},
    "data2_fsdp4": {"data": (2, REDUCE), "fsdp": (4, GATHER)},
    "fsdp2_context2_tensor2": {"fsdp": (2, GATHER), "context": (2, MOVE), "tensor": (2, REDUCE)},
    "data2_context4": {"data": (2, REDUCE), "context": (4, MOVE)},
}
COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(.*?"
    r"(?:replica_groups|source_target_pairs)=((?:mesh)?[\[{].*?)(?:, [a-z]\w+=[^(]|$)",
    re.M,
)
QUICK = ("fsdp2_context2_tensor2",)  # has every kind of axis but data
STEPS = 3
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **about: COMPILED.append(event) if "backend_compile" in event else None
)


@pytest.fixture(scope="module")
def experiment():
    """The base config's program at its smallest, in float32: roundings in bfloat16 differ."""
    return Experiment(
        resolve(
            "configs/t2v_base.py:smoke",
            [
                "--config.model.backbone.dtype=float32",
                "--config.model.backbone.remat=none",
                "--config.optim.warmup_steps=1",
            ],
        )
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 7, 8)
    return {
        "latents": rng.normal(size=(8, 4, 8, 8, 4)).astype(np.float16),
        "text": rng.normal(size=(8, 6, 32)).astype(np.float32),
        "text_mask": np.arange(6) < lengths[:, None],
        "fps": rng.choice([8.0, 24.0], 8).astype(np.float32),
        "num_frames": np.full(8, 16, np.int32),
        "key": np.array(["clip"] * 8),
    }


@pytest.fixture(scope="module")
def params(experiment, randomise):
    """No layer is left at zero, or most of the network would have no gradient to compare."""
    return randomise(new_shapes(experiment.model))


def keep_gradient() -> optax.GradientTransformation:
    """Puts the gradient that the step computed where the test can read it: in the state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (grads, grads),
    )


class Steps:
    """A few training steps on a mesh, as vdx.train.loop takes them."""

    def __init__(self, experiment, params, batch, spec, devices):
        self.mesh = MeshSpec(**{"data": 1, **spec}).make(devices)
        tx = optax.chain(keep_gradient(), experiment.tx)
        with jax.set_mesh(self.mesh):
            zero = jnp.zeros((), jnp.int32)
            state = TrainState(
                zero, params, tx.init(params), params, jax.random.key(3), jnp.float32(0), zero
            )
            self.shardings = state_shardings(self.mesh, state)
            state = jax.jit(lambda s: s, out_shardings=self.shardings)(state)
            batch = put_batch(self.mesh, batch)
            step = jax.jit(
                make_train_step(experiment.objective, tx, 0.99),
                donate_argnums=0,
                out_shardings=(self.shardings, replicated(self.mesh)),
            )
            COMPILED.clear()
            self.text = step.lower(state, batch).compile().as_text()
            self.losses = []
            for i in range(STEPS):
                state, metrics = step(state, batch)
                self.losses.append(float(metrics["loss"]))
                if i == 0:
                    self.gradient = jax.device_get(state.opt_state[0])
            self.state, self.compiles = state, len(COMPILED)

    def collectives(self) -> set[tuple[str, str]]:
        """(name, axes) of the collectives in the program, axes as in "data+fsdp"."""
        return {(name, self.axes(groups)) for name, groups in COLLECTIVE.findall(self.text)}

    def axes(self, groups: str) -> str:
        """The mesh axes along which the devices of a group differ."""
        parts = device_groups(groups)
        places = [np.unravel_index(group, self.mesh.devices.shape) for group in parts]
        return "+".join(a for i, a in enumerate(AXES) if any(len(set(p[i])) > 1 for p in places))


def ints(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]


def iota(text: str) -> np.ndarray:
    """The device numbers that XLA writes as [shape] or [shape]T(order)."""
    shape, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    return np.arange(np.prod(ints(shape))).reshape(ints(shape)).transpose(order and ints(order))


def device_groups(text: str) -> list[list[int]]:
    """Who talks to whom, from any of the three ways in which XLA writes it."""
    if text.startswith("{{"):
        return [ints(group) for group in text[2:-2].split("},{")]
    if text.startswith("["):  # [groups,size]<=[shape]T(order)
        sizes, devices = text.split("<=")
        return iota(devices).reshape(ints(sizes[1:-1])).tolist()
    sizes, devices, names = re.fullmatch(  # mesh['a'=2,'b'=4] {'b'}
        r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{([^:]*)\}", text
    ).groups()
    sizes = {name: int(n) for name, n in (part.split("=") for part in sizes.split(","))}
    grid = iota(devices or f"[{np.prod(list(sizes.values()))}]").reshape(list(sizes.values()))
    inside = [i for i, name in enumerate(sizes) if name in names.split(",")]
    grid = np.moveaxis(grid, inside, range(-len(inside), 0))
    return grid.reshape(-1, np.prod([list(sizes.values())[i] for i in inside])).tolist()


@pytest.fixture(scope="module")
def alone(experiment, params, batch):
    return Steps(experiment, params, batch, {}, jax.devices()[:1])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MESHES
    ],
)
def together(request, experiment, params, batch):
    sizes = {axis: size for axis, (size, _) in MESHES[request.param].items()}
    steps = Steps(experiment, params, batch, sizes, jax.devices())
    steps.expected = {axis: names for axis, (_, names) in MESHES[request.param].items()}
    return steps


def test_losses_are_those_of_one_device(alone, together):
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-6)
    assert len(set(alone.losses)) == STEPS  # the weights do change


def test_gradients_are_those_of_one_device(alone, together):
    """Leaf by leaf, so that a small one cannot hide behind a large one."""
    ours = dict(jax.tree_util.tree_leaves_with_path(together.gradient))
    for path, want in jax.tree_util.tree_leaves_with_path(alone.gradient):
        norm = np.linalg.norm(want)
        assert norm > 0, f"{path_str(path)} has no gradient to compare"
        assert np.linalg.norm(ours[path] - want) < 5e-6 * norm, path_str(path)


def test_the_program_moves_what_the_mesh_implies(together):
    found = together.collectives()
    for axis, names in together.expected.items():
        assert any(name in names and axis in axes.split("+") for name, axes in found), (axis, found)


def test_the_program_is_compiled_once(together):
    assert together.compiles == 1


def test_every_matrix_is_split_and_its_average_and_moments_with_it(together):
    mesh, state = together.mesh.shape, together.state
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = path_str(path)
        shares = leaf.size // leaf.addressable_shards[0].data.size
        if name.endswith("kernel"):
            wide = re.search(r"(q|k|v|out|up|down)/kernel$", name)  # of attention and MLPs
            assert shares == mesh["fsdp"] * (mesh["tensor"] if wide else 1), name
    where = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    for tree in (state.ema, state.opt_state[1][1][0].mu, state.opt_state[1][1][0].nu):
        assert jax.tree.map(lambda leaf: leaf.sharding, tree) == where


def test_one_device_talks_to_nobody(alone):
    assert not COLLECTIVE.search(alone.text) and alone.compiles == 1


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ],
)
def test_device_groups(text, groups):
    assert device_groups(text) == groups


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "needs 3 devices, and 8 are here"),
        ({"data": -1, "fsdp": 3}, "needs a multiple of 3 devices, and 8 are here"),
        ({"data": -1, "fsdp": -1}, "at most one size is -1"),
        ({"data": 8, "tensor": 0}, r"mesh\.tensor = 0 is out of range, expected -1 \| int >= 1"),
        ({"data": 4}, "needs 4 devices"),
    ],
)
def test_a_mesh_that_does_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        MeshSpec(**sizes).make()


def test_a_mesh_takes_the_devices_that_are_left():
    assert dict(MeshSpec(fsdp=2, tensor=2).make().shape) == {
        "data": 2,
        "fsdp": 2,
        "context": 1,
        "tensor": 2,
    }


def test_parameters_that_cannot_be_laid_out_are_all_named():
    mesh = MeshSpec(data=1, fsdp=4, tensor=2).make()
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    tree = {
        "mlp": {"up": {"kernel": shape(6, 8), "bias": shape(8)}},
        "strange": {"weights": shape(8, 8)},
        "q": {"kernel": shape(3, 8, 5)},
    }
    with pytest.raises(ValueError) as error:
        param_shardings(mesh, tree)
    for part in (
        r"mlp/up/kernel (6, 8): 6 is not a multiple of mesh axis fsdp = 4",
        r"q/kernel (3, 8, 5): 5 is not a multiple of mesh axis tensor = 2",
        r"strange/weights (8, 8): no sharding rule matches",
    ):
        assert part in str(error.value)
    assert "bias" not in str(error.value)


@pytest.mark.parametrize("config", ["t2v_base", "i2v_base", "motion_module_sd15"])
def test_the_pod_configs_fit_on_pods(config):
    """Every parameter of their full size can be split over 32 and over 64 chips."""
    shapes = Experiment(resolve(f"configs/{config}.py", [])).shapes
    for chips in (32, 64):
        param_shardings(jax.sharding.AbstractMesh((1, chips, 1, 1), AXES), shapes)


def test_a_rule_with_an_unknown_axis():
    with pytest.raises(ValueError, match=r"unknown mesh axes \['tensr'\]"):
        param_shardings(MeshSpec().make(), {}, (("kernel$", ("tensr",)),))


def test_rules_speak_of_the_last_dimensions():
    mesh = MeshSpec(data=1, fsdp=4, tensor=2).make()
    tree = {
        "layers": {
            "q": {"kernel": np.zeros((5, 8, 8))},
            "out": {"kernel": np.zeros((8, 8))},
            "norm": {"scale": np.zeros(7)},
        }
    }
    got = jax.tree.map(lambda s: s.spec, param_shardings(mesh, tree))["layers"]
    assert got["q"]["kernel"] == P(None, "fsdp", "tensor")
    assert got["out"]["kernel"] == P("tensor", "fsdp") and got["norm"]["scale"] == P(None)


def test_constrain():
    mesh = MeshSpec(data=1, fsdp=2, context=2, tensor=2).make()
    place = lambda x, *axes: jax.jit(lambda x: constrain(x, *axes))(x)
    share = lambda *args: place(*args).addressable_shards[0].data.shape
    x = np.zeros((4, 6, 8), np.float32)
    with jax.set_mesh(mesh):
        assert share(x, "b t d", "t") == (2, 3, 8)
        assert share(x, "b s n") == (2, 6, 4) == share(x, "b s f")
        assert share(x[:1], "b t d", "t") == (1, 3, 8)  # one clip alone cannot be split
        with pytest.raises(ValueError, match=r"Axis 't' of 'b t d'.*has 3 entries"):
            place(x[:, :3], "b t d", "t")
        with pytest.raises(ValueError, match=r"Axis 'b'.*\('data', 'fsdp'\) = 2"):
            place(x[:3], "b t d")
    assert constrain(x, "b t d", "t") is x  # without a mesh


def test_put_batch_splits_rows_and_leaves_words_behind(batch):
    mesh = MeshSpec(data=2, fsdp=4).make()
    placed = put_batch(mesh, batch)
    assert set(placed) == set(batch) - {"key"}
    for name, value in placed.items():
        assert {s.data.shape[0] for s in value.addressable_shards} == {1}
        np.testing.assert_array_equal(np.asarray(value), batch[name])
