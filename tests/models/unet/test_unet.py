"""U-Nets, where no reference decides: the parts, the protocol of a backbone, the files."""

import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from tests.xla_flags import EXACT
from vdx.config.build import ConfigError
from vdx.interop.keymap import WeightsError, export
from vdx.interop.unet import load_unet, open_unet, save_unet
from vdx.interop.unet_config import control_config, motion_config, unet_config, unet_from_config
from vdx.interop.unet_rows import transformer_rows
from vdx.models.denoiser import Denoiser
from vdx.models.image_blocks import GroupNorm
from vdx.models.shapes import init_shapes, new_shapes
from vdx.models.unet.blocks import BlockConfig, SpaceTransformer, TimeConvs, TimeTransformer
from vdx.models.unet.controlnet import Hint
from vdx.models.unet.temporal import Temporal, temporal_of
from vdx.models.unet.unet import UNet
from vdx.parallel import MeshSpec, param_shardings
from vdx.types import Ports

TINY = {
    "name": "unet",
    "widths": (8, 16),
    "layers": 1,
    "attention": (True, False),
    "heads": 2,
    "groups": 4,
}
TEXT = {"embeddings": {"features": 6, "length": 77, "null_tokens": 77, "project": False}}
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "sample_size": 64,
    "flip_sin_to_cos": True,
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4, 6, 4)).astype(np.float32)
TIME = np.array([3.0, 700.0], np.float32)
TOKENS = RNG.normal(size=(2, 5, 6)).astype(np.float32)


def model(signals=TEXT, **fields) -> Denoiser:
    return Denoiser({**TINY, **fields}, signals)


def shapes(made: Denoiser):
    return new_shapes(made)


def apply(made: Denoiser, params, x, time, **ports):
    ports = Ports(**{name: jnp.asarray(value) for name, value in ports.items()})
    return jax.jit(lambda *args: made.run(*args), compiler_options=EXACT)(params, x, time, ports)


# Parts


def test_group_norm_of_frames_and_of_clips():
    """Against torch, whose [b c t h w] it normalises at once and [(b t) c h w] frame by frame."""
    torch = pytest.importorskip("torch")
    norm = torch.nn.GroupNorm(2, 4, eps=1e-5).requires_grad_(False)
    x = torch.from_numpy(5 + X)
    want = {
        True: norm(x.movedim(-1, 1)).movedim(1, -1),
        False: norm(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1).reshape(X.shape),
    }
    for joint, value in want.items():
        ours = GroupNorm(2, 1e-5, joint)
        got = ours.apply(ours.init(jax.random.key(0), 5 + X), 5 + X)
        np.testing.assert_allclose(got, value, atol=2e-5)
    assert (want[True] - want[False]).abs().max() > 0.05


@pytest.mark.parametrize("joint", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_motion_module_with_either_norm(joint, randomise):
    """Of frames each by itself, as AnimateDiff's own code has it, the reference is diffusers' with
    its norm given frames."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.models.unets.unet_motion_model")
    theirs = (
        module.AnimateDiffTransformer3D(
            2,
            4,
            8,
            norm_num_groups=4,
            activation_fn="geglu",
            positional_embeddings="sinusoidal",
            num_positional_embeddings=32,
        )
        .eval()
        .requires_grad_(False)
    )
    ours = TimeTransformer(2, 8, BlockConfig(2, 0, 4, joint, Temporal(), jnp.float32))
    x = RNG.normal(size=(2, 3, 4, 6, 8)).astype(np.float32)
    params = randomise(init_shapes(ours, x))
    for key, value in export({"x": params}, [*transformer_rows("x", "x", linear=True)]):
        theirs.get_parameter(key.removeprefix("x.")).copy_(torch.tensor(value))
    if not joint:
        whole = theirs.norm.forward

        def frames(y):  # b c t h w
            b = len(y)
            return whole(y.movedim(2, 1).flatten(0, 1)).unflatten(0, (b, -1)).movedim(1, 2)

        theirs.norm.forward = frames
    y = theirs(torch.from_numpy(x).flatten(0, 1).movedim(-1, 1), num_frames=3)
    want = y.movedim(1, -1).reshape(x.shape).numpy()
    got = jax.jit(lambda p, x: ours.apply({"params": p}, x))(params, x)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_what_is_between_frames():
    assert temporal_of("none") == Temporal(motion=False)
    assert temporal_of({"name": "time"}).mixer == {"name": "time"}
    for spec, message in (
        ("motoin", "Did you mean 'motion'"),
        ({"name": "tiem"}, "'time'"),
        ({"name": "time", "no": 1}, "Unknown key model.temporal.no"),
    ):
        with pytest.raises(ConfigError, match=message):
            temporal_of(spec)


@pytest.mark.parametrize(
    "temporal",
    [
        "motion",
        pytest.param("3d", marks=pytest.mark.slow),
        pytest.param({"name": "time"}, marks=pytest.mark.slow),
    ],
    ids=["motion", "3d", "mixer"],
)
def test_fresh_it_is_the_image_network(temporal, randomise):
    """On every frame, in every bit; and once it is trained frames do exchange."""
    image, clip = model(), model(temporal=temporal)
    params = randomise(shapes(image))
    fresh = flatten_dict(
        jax.tree.map(lambda s: RNG.normal(size=s.shape).astype(np.float32) / 4, shapes(clip)),
        sep="/",
    )
    new = [path for path in fresh if "motion" in path or "time_convs" in path]
    last = [path for path in new if "proj_out" in path or "conv_3" in path]
    zeros = {path: np.zeros_like(fresh[path]) for path in last}
    old = flatten_dict(params, sep="/")
    assert set(old) | set(new) == set(fresh) and len(last) > 3

    def whole(*changes):
        return unflatten_dict(
            {k: v for part in (fresh, old, *changes) for k, v in part.items()}, sep="/"
        )

    want = apply(image, params, X, TIME, tokens=TOKENS)
    run = jax.jit(
        lambda p: clip.run(p, X, TIME, Ports(tokens=jnp.asarray(TOKENS))), compiler_options=EXACT
    )
    np.testing.assert_array_equal(run(whole(zeros)), want)
    assert np.std(want) > 0.1 and np.abs(run(whole()) - want).max() > 1e-2


def test_what_begins_at_zero():
    """The last projections, so that the last test's zeros are what is made."""
    config = BlockConfig(2, 0, 4, True, Temporal(), jnp.float32)
    x = X[:1, :1, :2, :2].repeat(2, -1)
    for module, inputs, name in (
        (TimeTransformer(2, 8, config), (x,), "proj_out"),
        (SpaceTransformer(2, 8, config), (x,), "proj_out"),
        (TimeConvs(4, jnp.float32), (x,), "conv_3"),
        (Hint((), 8, jnp.float32), (x,), "conv_in"),
        (Hint((4, 6), 8, jnp.float32), (x,), "conv_out"),
    ):
        made = jax.jit(module.init)(jax.random.key(0), *inputs)["params"]
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(made[name]))
        assert any(np.any(leaf) for leaf in jax.tree.leaves(made)) or len(made) == 1


@pytest.mark.slow
def test_a_fresh_control_branch_is_nothing(randomise):
    signals = {**TEXT, "control": {"channels": 4, "side": 1}}
    made = model(signals, control="image", hint=())
    params = jax.jit(made.new_params)(jax.random.key(0))
    network = randomise(shapes(model()))["network"] | {"control": params["network"]["control"]}
    params = {"network": network, "conditioning": params["conditioning"]}
    control = 9 * RNG.normal(size=X.shape).astype(np.float32)
    got = [
        apply(
            made,
            params,
            X,
            TIME,
            tokens=TOKENS,
            control=control,
            control_scale=np.full(2, scale, np.float32),
        )
        for scale in (0.0, 1.0)
    ]
    np.testing.assert_array_equal(*got)
    assert np.std(got[0]) > 0.1


# The protocol of a backbone


def test_the_protocol():
    network = UNet(
        widths=(8, 16, 16), attention=(True, True, False), heads=2, groups=4, stem=(2, 4, 2)
    )
    assert network.patch == (2, 16, 8) and network.dims().width == 32
    assert network.grid((4, 32, 16, 3)) == (2, 8, 8)
    assert model().num_tokens(X[..., :4].shape) == 3 * 4 * 6
    with pytest.raises(ValueError, match=r"\(3, 5, 6\) .* multiples of \(1, 2, 2\)"):
        model().num_tokens((1, 3, 5, 6, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": (8, 18)}, "are not multiples of model.groups = 4"),
        ({"heads": 3}, "not multiples of model.heads = 3"),
        ({"head_width": 16}, "not multiples of model.head_width = 16"),
        ({"attention": (True,)}, "needs one entry for each of the levels"),
        ({"control": "images"}, "Did you mean 'image'"),
        ({"control": "image"}, "needs the signal"),
        ({"remat": "most"}, r"model\.backbone\.remat: unknown name 'most'\. Known: none, full,"),
    ],
)
def test_a_network_that_cannot_be_meant(fields, message):
    with pytest.raises(ConfigError, match=message):
        shapes(model(**fields))


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ({"image_tokens": {"features": 6}}, "no port 'image_tokens'"),
        ({"control": {"channels": 3}}, "no port 'control'"),
    ],
)
def test_ports_that_are_not_there(signals, message):
    with pytest.raises(ConfigError, match=message):
        shapes(model({**TEXT, **signals}))


@pytest.mark.slow
def test_times_of_frames_a_vector_and_a_mask(randomise):
    """A clip whose frames have one time is one with that time; tokens that are masked are not
    there; a vector and the time of one frame change what they should."""
    made = model(attention=(True, True))
    params = randomise(shapes(made))
    run = jax.jit(
        lambda t, tokens, mask, vector: made.run(
            params, X, t, Ports(tokens=tokens, tokens_mask=mask, vector=vector)
        ),
    )
    mask, vector = np.arange(5) < np.array([[3], [5]]), np.zeros((2, 32), np.float32)
    frames = np.repeat(TIME[:, None], 3, 1)
    want = run(frames, TOKENS, mask, vector)
    other = np.where(mask[..., None], TOKENS, 9.0).astype(np.float32)
    np.testing.assert_allclose(run(frames, other, mask, vector), want, atol=1e-5)
    np.testing.assert_allclose(
        apply(made, params, X, TIME, tokens=TOKENS, tokens_mask=mask), want, atol=1e-5
    )
    changed = np.abs(run(frames + np.array([0, 90, 0], np.float32), TOKENS, mask, vector) - want)
    assert changed[:, 1].max() > 1e-2 and changed[:, 0].max() < 1e-5  # images do not mix
    assert (
        np.abs(run(frames, TOKENS, mask, vector + np.eye(2, 32, dtype=np.float32)) - want).max()
        > 1e-2
    )
    with pytest.raises(ValueError, match=r"time is \(2, 2\)"):
        made.run(params, X, frames[:, :2], Ports())


def test_maps_of_another_size(randomise):
    signals = {**TEXT, "control": {"channels": 3, "side": 2}}
    made = model(signals, control="image", hint=(4, 6))
    assert shapes(made)["network"]["control"]["hint"]["conv_1"]["kernel"].shape == (3, 3, 4, 6)
    with pytest.raises(ValueError, match=r"are \(3, 4, 6\).*needs \(3, 8, 12\).*side = 2"):
        made.run(
            randomise(shapes(made)),
            X,
            TIME,
            Ports(control=jnp.zeros((2, 3, 4, 6, 3)), control_scale=jnp.ones(2)),
        )


def test_a_stem_is_a_rearrangement(randomise):
    """Patches in, patches out: with a network that is the identity nothing moves."""
    made = model(stem=(1, 2, 3), attention=(False, False))
    assert made.backbone.patch == (1, 4, 6)
    params = shapes(made)
    assert params["network"]["encoder"]["conv_in"]["kernel"].shape == (3, 3, 24, 8)
    assert params["network"]["conv_out"]["kernel"].shape == (3, 3, 8, 24)
    zeros = randomise(params)
    zeros["network"]["conv_out"]["kernel"] *= 0
    zeros["network"]["conv_out"]["bias"] = np.arange(24, dtype=np.float32)
    got = apply(made, zeros, X, TIME, tokens=TOKENS)
    np.testing.assert_array_equal(got[0, 0, :2, :3], np.arange(24).reshape(2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temporal": "motion", "control": "sparse", "hint": ()},
        {"temporal": "3d", "head_width": 64},
    ],
    ids=["image", "motion", "3d"],
)
def test_the_public_sizes_and_their_sharding(fields):
    signals = {
        "embeddings": {**TEXT["embeddings"], "features": 1024 if "head_width" in fields else 768}
    }
    if "control" in fields:
        signals["control"] = {"channels": 5}
    like = shapes(Denoiser({"name": "unet", **fields}, signals))
    control = like["network"].pop("control", {})
    network, branch = (
        round(sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) / 1e6)
        for tree in (like["network"], control)
    )
    assert network == {"3d": 1411, "motion": 1313}.get(fields.get("temporal"), 860)
    assert branch == (497 if "control" in fields else 0)
    like["network"]["control"] = control
    for spec in ({"fsdp": 8}, {"tensor": 8}):
        param_shardings(MeshSpec(**{"data": 1, **spec}).make(), like)


@pytest.mark.slow
@pytest.mark.parametrize("temporal", ["motion", "3d"])
def test_eight_devices_are_one(temporal, randomise):
    made = model(temporal=temporal, widths=(16, 32))
    params = randomise(shapes(made))
    x = RNG.normal(size=(2, 2, 4, 4, 4)).astype(np.float32)

    def run(p, x, t, k):
        return made.run(p, x, t, Ports(tokens=k))

    want = jax.jit(run)(params, x, TIME, TOKENS)
    for spec in (
        {"data": 2, "fsdp": 1, "context": 2, "tensor": 2},
        {"data": 1, "fsdp": 2, "context": 1, "tensor": 4},
    ):
        mesh = MeshSpec(**spec).make()
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, param_shardings(mesh, params))
            np.testing.assert_allclose(jax.jit(run)(placed, x, TIME, TOKENS), want, atol=2e-5)


# Files


@pytest.fixture(scope="module")
def folders(tmp_path_factory, randomise):
    """An image model and a motion adapter, as diffusers saves them, and what is in them."""
    root = tmp_path_factory.mktemp("folders")
    clip = model(temporal="motion", motion_middle=False)
    params = randomise(shapes(clip))
    for part in ("unet", "motion"):
        save_unet(params, clip, root / part, part=part)
    image = {k: v for k, v in flatten_dict(params, sep="/").items() if "/motion/" not in k}
    save_unet(unflatten_dict(image, sep="/"), model(), root / "image")
    return clip, params, root


def same(got, want):
    want = dict(flatten_dict(want, sep="/"))
    want["conditioning/embeddings/null"] = np.zeros((77, 6))
    got = flatten_dict(got, sep="/")
    assert set(got) == set(want)
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def test_an_image_model_and_a_motion_adapter(folders, mesh, tmp_path):
    clip, params, root = folders
    same(load_unet(root / "unet", clip, mesh), params)
    same(load_unet([root / "image", root / "motion"], clip, mesh), params)


# AnimateDiff's own files


MAKERS_NAMES = (
    (".norm1.", ".norms.0."),
    (".norm2.", ".norms.1."),
    (".norm3.", ".ff_norm."),
    (".attn1.", ".attention_blocks.0."),
    (".attn2.", ".attention_blocks.1."),
)


def makers_file(folder, frames=32):
    """The arrays of a folder of diffusers as AnimateDiff's makers name them."""
    own = {}
    for key, value in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        if ".motion_modules." not in key:
            own[key] = value
            continue
        if key.endswith("pos_embed.pe"):  # once for each attention
            for i in (0, 1):
                there = key.replace("pos_embed", f"attention_blocks.{i}.pos_encoder")
                own[_in_transformer(there)] = value[:, :frames]
            continue
        for new, old in MAKERS_NAMES:
            key = key.replace(new, old)
        own[_in_transformer(key)] = value
    return own


def _in_transformer(key):
    head, _, tail = key.partition(".motion_modules.")
    number, _, rest = tail.partition(".")
    return f"{head}.motion_modules.{number}.temporal_transformer.{rest}"


def save_ckpt(path, arrays, *wrappers):
    torch = pytest.importorskip("torch")
    content = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
    for wrapper in wrappers:
        content = {"epoch": 3, "animatediff_config": {"name": "v"}, wrapper: content}
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("frames", "residuals", "prefix", "wrappers"),
    [(24, True, "", ()), (32, False, "module.", ("state_dict",))],
)
def test_motion_modules_of_the_makers(frames, residuals, prefix, wrappers, folders, mesh, tmp_path):
    """v1 and v3: the file says how features are normalised."""
    clip, params, root = folders
    own = {f"{prefix}{k}": v for k, v in makers_file(root / "motion", frames).items()}
    files = [root / "image", save_ckpt(tmp_path / "mm.ckpt", own, *wrappers)]

    fields, signals = open_unet(files).denoiser_fields()
    theirs = Denoiser(fields, signals)
    network = theirs.backbone
    assert (network.joint_norm, network.joint_residual_norm) == (False, residuals)
    assert (network.temporal, network.motion_middle) == ("motion", False)
    same(load_unet(files, theirs, mesh), params)

    with pytest.raises(WeightsError, match="joint_norm = True, but the motion modules have False"):
        load_unet(files, clip, mesh)
    wrong = Denoiser({**fields, "joint_residual_norm": not residuals}, signals)
    with pytest.raises(WeightsError, match=f"joint_residual_norm = {not residuals}, but the mot"):
        load_unet(files, wrong, mesh)


def test_a_motion_module_in_the_middle_is_v2(folders, tmp_path):
    _, _, root = folders
    own = makers_file(root / "motion")
    middle = {
        key.replace("down_blocks.0", "mid_block"): value
        for key, value in own.items()
        if key.startswith("down_blocks.0")
    }
    path = save_ckpt(tmp_path / "mm_sd_v15_v2.ckpt", own | middle)
    backbone, _ = open_unet([root / "image", path]).denoiser_fields()
    assert backbone["motion_middle"] and not backbone["joint_norm"]
    assert not backbone["joint_residual_norm"]


@pytest.mark.parametrize(
    ("hint", "wrappers", "prefix"), [((), ("controlnet",), "module."), ((2, 3, 5), (), "")]
)
def test_sparsectrl_of_the_makers(hint, wrappers, prefix, folders, mesh, tmp_path, randomise):
    side = 4 if hint else 1
    # Colours or latents, and the mask.
    signals = {**TEXT, "control": {"channels": 4 if hint else 5, "side": side}}
    made = model(
        signals,
        temporal="motion",
        motion_middle=False,
        control="sparse",
        hint=hint,
        joint_norm=False,
    )
    params = randomise(shapes(made))
    save_unet(params, made, tmp_path / "control", part="control")
    own = {f"{prefix}{k}": v for k, v in makers_file(tmp_path / "control").items()}
    files = [folders[2] / "unet", save_ckpt(tmp_path / "rgb.ckpt", own, *wrappers)]

    theirs = Denoiser(*open_unet(files).denoiser_fields())
    for field in ("control", "hint", "joint_norm", "widths", "groups"):
        assert getattr(theirs.backbone, field) == getattr(made.backbone, field)
    assert theirs.signals["control"] == signals["control"]
    got = flatten_dict(load_unet(files, theirs, mesh)["network"]["control"], sep="/")
    for path, value in flatten_dict(params["network"]["control"], sep="/").items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def test_a_lora_of_animatediff_is_refused(folders, tmp_path):
    _, _, root = folders
    key = (
        "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0."
        "attention_blocks.0.processor.to_q_lora.down.weight"
    )
    path = save_ckpt(tmp_path / "v2_lora_ZoomIn.ckpt", {key: np.ones((2, 8), np.float32)})
    with pytest.raises(WeightsError, match="is a LoRA of an image U-Net or of motion modules"):
        open_unet([root / "image", path])


def test_diffusers_reads_the_adapter(folders):
    diffusers = pytest.importorskip("diffusers")
    _, _, root = folders
    with warnings.catch_warnings(action="ignore"):
        adapter = diffusers.MotionAdapter.from_pretrained(root / "motion")
    file = load_file(root / "motion" / "diffusion_pytorch_model.safetensors")
    state = adapter.state_dict()
    assert set(state) == set(file) and adapter.mid_block is None
    for key, value in file.items():
        np.testing.assert_array_equal(state[key], value, err_msg=key)


def test_what_is_trained_may_be_missing(folders, mesh):
    clip, _, root = folders
    read = load_unet(root / "image", clip, mesh, "bfloat16", trained="/motion/")
    assert not [k for k in flatten_dict(read, sep="/") if "/motion/" in k]
    with pytest.raises(WeightsError, match=r"motion/proj_in/kernel .*: not in the file"):
        load_unet(root / "image", clip, mesh)
    with pytest.raises(WeightsError, match=r"down_0_0/motion/.*: not in the file"):
        load_unet(root / "image", clip, mesh, trained="/up_.*/motion/")
    both = flatten_dict(
        load_unet([root / "image", root / "motion"], clip, mesh, "bfloat16", "/motion/"), sep="/"
    )
    kinds = {
        ("/motion/" in k, str(v.dtype))
        for k, v in both.items()
        if k.endswith("kernel") and "/time/" not in k
    }
    assert kinds == {(True, "float32"), (False, "bfloat16")}


@pytest.mark.parametrize("kind", ["image", "sparse"])
def test_a_control_branch_begins_as_a_copy(kind, folders, mesh):
    _, _, root = folders
    made = model(
        {**TEXT, "control": {"channels": 4, "side": 2}},
        control=kind,
        hint=(4, 6),
        temporal="motion",
        motion_middle=False,
    )
    read = flatten_dict(load_unet(root / "unet", made, mesh, trained="^network/control/"), sep="/")
    copied = [k for k in read if k.startswith("network/control/")]
    assert copied == [k for k in copied if k.startswith("network/control/encoder/")]
    want = {
        k for k in flatten_dict(shapes(made), sep="/") if k.startswith("network/control/encoder/")
    }
    assert set(copied) == want and (kind == "sparse") == any("/motion/" in k for k in copied)
    for path in copied:
        np.testing.assert_array_equal(read[path], read[path.replace("control/encoder", "encoder")])


def test_configs_go_there_and_back():
    for config, fields in (
        (SD15, {}),
        ({**SD15, "attention_head_dim": [5, 10, 20, 20]}, {"head_width": 64}),
    ):
        backbone, signals = unet_from_config(config)
        assert backbone["temporal"] == "none" and not fields.items() - backbone.items()
        again = unet_config(Denoiser(backbone, signals))
        assert unet_from_config(again) == (backbone, signals)
        assert not {
            k: v for k, v in again.items() if k in config and k != "sample_size" and v != config[k]
        }
    made = model(
        {**TEXT, "control": {"channels": 4, "side": 1}},
        temporal="motion",
        control="sparse",
        hint=(),
    )
    assert motion_config(made)["motion_layers_per_block"] == 1
    assert control_config(made)["conditioning_channels"] == 3
    with pytest.raises(WeightsError, match=r"no U-Net of model\.temporal = \{'name'"):
        unet_config(model(temporal={"name": "time"}))
    for signals in ({**TEXT, "fps": {}}, {"embeddings": {"features": 6}}):
        with pytest.raises(WeightsError, match=r"diffusers has no U-Net of .* and signals"):
            unet_config(model(signals))
    with pytest.raises(WeightsError, match="'none' is no branch"):
        control_config(model())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "is of UNet2DModel; U-Nets are"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu', not 'silu'"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time': not known"),
        ({"transformer_layers_per_block": [1, 2, 10, 10]}, "transformer_layers_per_block"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types = .* not"),
        ({"layers_per_block": [1, 2, 2, 2]}, "differs from level to level"),
        ({"attention_head_dim": [8, 8, 8, 4]}, "heads of several widths"),
        ({"in_channels": 3}, "in_channels is less"),
        ({"norm_num_groups": None}, "norm_num_groups: is missing"),
    ],
)
def test_a_config_that_is_another_network(fields, message):
    with pytest.raises(WeightsError, match=message):
        unet_from_config({**SD15, **fields})


def test_folders_that_are_no_network(folders, tmp_path):
    _, _, root = folders
    with pytest.raises(WeightsError, match=r"should hold one of .* and hold: MotionAdapter"):
        open_unet(root / "motion")
    with pytest.raises(WeightsError, match="have the same arrays"):
        open_unet([root / "unet", root / "image"])
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        open_unet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Wan"}))
    with pytest.raises(WeightsError, match="is a Wan; U-Nets are made of"):
        open_unet(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 4}, "heads x width"),
        ({"groups": 8}, "groups = 8, but the weights have 4"),
        ({"motion_middle": True}, "motion_middle = True, but the weights have False"),
    ],
)
def test_another_network_than_the_weights(fields, message, folders, mesh):
    _, _, root = folders
    made = model(**{"temporal": "motion", "motion_middle": False, **fields})
    with pytest.raises(WeightsError, match=message):
        load_unet(root / "unet", made, mesh)
