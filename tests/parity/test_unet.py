"""The U-Nets against diffusers with the same weights, read by the real loader, and back again."""

import copy
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vdx.interop.unet import load_unet, save_unet
from vdx.interop.unet_config import control_from_config, unet_from_config
from vdx.models.denoiser import Denoiser
from vdx.types import Ports

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TINY = {
    "block_out_channels": [16, 32],
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "layers_per_block": 1,
    "sample_size": 8,
}


def levels(kind: str) -> dict:
    return {
        "down_block_types": [f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"],
        "up_block_types": [f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"],
    }


CONTROL = {
    key: value
    for key, value in {**TINY, **levels("2D")}.items()
    if key not in ("sample_size", "up_block_types")
}
CONTROLS = {
    "image": (
        "ControlNetModel",
        {**CONTROL, "attention_head_dim": 2, "conditioning_embedding_out_channels": [4, 6]},
    ),
    "sparse": (
        "SparseControlNetModel",
        {
            **CONTROL,
            "attention_head_dim": 2,
            "motion_num_attention_heads": 2,
            "down_block_types": levels("Motion")["down_block_types"],
            "conditioning_channels": 3,
            "conditioning_embedding_out_channels": [4, 6],
            "use_simplified_condition_embedding": False,
        },
    ),
    "sparse_latents": (
        "SparseControlNetModel",
        {
            **CONTROL,
            "attention_head_dim": 2,
            "motion_num_attention_heads": 2,
            "down_block_types": levels("Motion")["down_block_types"],
        },
    ),
}
CLASSES = {
    "image": ("UNet2DConditionModel", {**TINY, **levels("2D"), "attention_head_dim": 2}),
    "motion": (
        "UNetMotionModel",
        {**TINY, **levels("Motion"), "num_attention_heads": 2, "motion_num_attention_heads": 2},
    ),
    "3d": ("UNet3DConditionModel", {**TINY, **levels("3D"), "attention_head_dim": 8}),
    # Stable Diffusion 2's layout, with channels next to the clip.
    "image_2": (
        "UNet2DConditionModel",
        {
            **TINY,
            **levels("2D"),
            "attention_head_dim": [2, 4],
            "use_linear_projection": True,
            "in_channels": 7,
        },
    ),
}
SLOW = pytest.mark.slow
B, T, H, W = 2, 3, 4, 6


def randomised(model, seed=0):
    """Every parameter redrawn: no layer is at zero, no norm's scale at one."""
    torch.manual_seed(seed)
    model.eval().requires_grad_(False)
    for name, value in model.named_parameters():
        noise = torch.randn_like(value)
        scale = 0.2 if value.ndim == 1 else value[0].numel() ** -0.5
        value.copy_(
            1 + 0.1 * noise
            if "norm" in name and name.endswith("weight") and value.ndim == 1
            else scale * noise
        )
    return model


def saved(kind, config, folder, seed=0):
    """A model of diffusers with random weights, in a folder."""
    with warnings.catch_warnings(action="ignore"):
        model = randomised(getattr(diffusers, kind)(**config), seed)
    model.save_pretrained(folder)
    return model


class Case:
    def __init__(self, name, folder, mesh):
        self.name, self.folder, self.mesh = name, folder, mesh
        self.torch = saved(*CLASSES[name], folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.model = Denoiser(*unet_from_config(self.config))
        self.params = load_unet(folder, self.model, mesh)

    def inputs(self, seed=0):
        rng = np.random.default_rng(seed)
        return (
            rng.normal(size=(B, T, H, W, self.torch.config.in_channels)).astype(np.float32),
            np.array([7.0, 801.0], np.float32),
            rng.normal(size=(B, 5, 12)).astype(np.float32),
        )

    def reference(self, x, time, tokens) -> np.ndarray:
        x, time, tokens = map(torch.from_numpy, (x, time, tokens))
        if self.name == "3d":
            y = self.torch(x.movedim(-1, 1), time, tokens).sample
        elif self.name == "motion":  # as the pipeline does: one text for each frame
            y = self.torch(x.movedim(-1, 1), time, tokens.repeat_interleave(T, 0)).sample
        else:
            y = self.torch(
                x.flatten(0, 1).movedim(-1, 1),
                time.repeat_interleave(T),
                tokens.repeat_interleave(T, 0),
            ).sample
            return y.movedim(1, -1).reshape(*x.shape[:-1], 4).numpy()
        return y.movedim(1, -1).numpy()


@pytest.fixture(
    scope="module",
    params=["motion", *(pytest.param(name, marks=SLOW) for name in CLASSES if name != "motion")],
)
def case(request, tmp_path_factory, mesh):
    return Case(request.param, tmp_path_factory.mktemp("unet"), mesh)


def run(case, params, x, time, ports, model=None):
    model = model or case.model
    apply = jax.jit(lambda p, x, t, ports: model.run(p, x, t, ports))
    return apply(params, x, time, ports)


def test_it_is_the_reference(case):
    x, time, tokens = case.inputs()
    want = case.reference(x, time, tokens)
    ports = Ports(tokens=jnp.asarray(tokens), concat=x[..., 4:] if x.shape[-1] > 4 else None)
    got = run(case, case.params, x[..., :4], time, ports)
    assert want.std() > 0.1 and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_every_key_goes_there_and_back(case, tmp_path):
    save_unet(case.params, case.model, tmp_path / "back")
    if case.name == "image_2":  # its projections come back as convolutions
        again = load_unet(tmp_path / "back", case.model, case.mesh)
        jax.tree.map(np.testing.assert_array_equal, again, case.params)
        return
    there, back = (
        load_file(f / "diffusion_pytorch_model.safetensors")
        for f in (case.folder, tmp_path / "back")
    )
    assert set(back) == set(there)
    for key, value in there.items():
        same = (
            np.testing.assert_array_equal if "pos_embed" not in key else np.testing.assert_allclose
        )
        same(back[key], value, **({} if "pos_embed" not in key else {"atol": 1e-6}), err_msg=key)
    with warnings.catch_warnings(action="ignore"):
        again = type(case.torch).from_pretrained(tmp_path / "back")
    for key, value in case.torch.state_dict().items():
        np.testing.assert_allclose(again.state_dict()[key], value, atol=1e-6, err_msg=key)


class EachFrame(torch.nn.Module):
    """The makers' norm in motion modules: of each frame [b c t h w] by itself."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        b, _, t = x.shape[:3]
        return self.norm(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, t)).transpose(1, 2)


class AllFrames(torch.nn.Module):
    """The makers' norm in residuals and the head with v1: of a clip [(b t) c h w] at once."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        joint = x.unflatten(0, (B, T)).transpose(1, 2)
        return self.norm(joint).transpose(1, 2).flatten(0, 1)


def normalised_by_the_makers(model, residuals):
    """A copy whose norms follow AnimateDiff's code: with v1 those of residuals and head, too."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name.endswith("motion_modules.0") or name.endswith("motion_modules.1"):
            module.norm = EachFrame(module.norm)
        elif residuals and ".resnets." in name and hasattr(module, "norm1"):
            module.norm1 = AllFrames(module.norm1)
            module.norm2 = AllFrames(module.norm2)
    if residuals:
        model.conv_norm_out = AllFrames(model.conv_norm_out)
    return model


@pytest.mark.parametrize("residuals", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize("case", ["motion"], indirect=True)
def test_norms_of_the_makers(residuals, case):
    x, time, tokens = case.inputs()
    plain = case.reference(x, time, tokens)
    makers = copy.copy(case)
    makers.torch = normalised_by_the_makers(case.torch, residuals)
    want = makers.reference(x, time, tokens)
    fields = {"joint_norm": False, "joint_residual_norm": residuals}
    model = Denoiser({**case.model.backbone_config, **fields}, case.model.signals)
    got = run(case, case.params, x, time, Ports(tokens=jnp.asarray(tokens)), model)
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


class Controlled:
    """A U-Net of diffusers and a control branch, and ours with both."""

    def __init__(self, kind, unet, folder):
        self.kind, self.unet, self.folder = kind, unet, folder
        self.torch = saved(*CONTROLS[kind], folder, seed=1)
        config = json.loads((folder / "config.json").read_text())
        fields, signal = control_from_config(config)
        self.model = Denoiser(
            {**unet.model.backbone_config, **fields}, {**unet.model.signals, "control": signal}
        )
        self.params = load_unet([unet.folder, folder], self.model, unet.mesh)
        rng, side = np.random.default_rng(2), signal["side"]
        self.control = rng.normal(size=(B, T, side * H, side * W, signal["channels"])).astype(
            np.float32
        )

    def reference(self, x, time, tokens, scale) -> np.ndarray:
        control, x0, time0, tokens0 = map(torch.from_numpy, (self.control, x, time, tokens))
        frames = tokens0.repeat_interleave(T, 0)
        if self.kind == "image":
            more, deepest = self.torch(
                x0.flatten(0, 1).movedim(-1, 1),
                time0.repeat_interleave(T),
                frames,
                control.flatten(0, 1).movedim(-1, 1),
                return_dict=False,
            )
        else:
            maps = control.movedim(-1, 1)
            more, deepest = self.torch(
                x0.movedim(-1, 1),
                time0,
                frames,
                maps[:, :-1],
                conditioning_mask=maps[:, -1:],
                return_dict=False,
            )
        weight = torch.from_numpy(scale).repeat_interleave(T).reshape(-1, 1, 1, 1)
        add_deltas = {
            "down_block_additional_residuals": [weight * y for y in more],
            "mid_block_additional_residual": weight * deepest,
        }
        if self.unet.name == "image":
            y = self.unet.torch(
                x0.flatten(0, 1).movedim(-1, 1), time0.repeat_interleave(T), frames, **add_deltas
            ).sample
            return y.movedim(1, -1).reshape(x.shape).numpy()
        y = self.unet.torch(x0.movedim(-1, 1), time0, frames, **add_deltas).sample
        return y.movedim(1, -1).numpy()


@SLOW
@pytest.mark.parametrize(
    ("kind", "case"),
    [("image", "image"), ("sparse", "motion"), ("sparse_latents", "motion")],
    indirect=["case"],
)
def test_control_is_the_reference(kind, case, tmp_path):
    both = Controlled(kind, case, tmp_path / "control")
    x, time, tokens = case.inputs()
    scale = np.array([0.0, 0.7], np.float32)
    want, plain = both.reference(x, time, tokens, scale), case.reference(x, time, tokens)
    got = run(
        case,
        both.params,
        x,
        time,
        Ports(
            tokens=jnp.asarray(tokens),
            control=jnp.asarray(both.control),
            control_scale=jnp.asarray(scale),
        ),
        both.model,
    )
    assert np.abs(want[1] - plain[1]).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    np.testing.assert_allclose(got[0], plain[0], atol=1e-4, rtol=0)

    save_unet(both.params, both.model, tmp_path / "back", part="control")
    again = type(both.torch).from_pretrained(tmp_path / "back")
    for key, value in both.torch.state_dict().items():
        np.testing.assert_allclose(again.state_dict()[key], value, atol=1e-6, err_msg=key)
