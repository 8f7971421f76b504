"""The U-Nets against diffusers with the same weights, read by the real loader, and back again."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vdx.interop.unet import load_unet, save_unet
from vdx.interop.unet_config import unet_from_config
from vdx.models.denoiser import Denoiser
from vdx.parallel import MeshSpec
from vdx.types import Ports

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TINY = {"block_out_channels": [16, 32], "norm_num_groups": 8, "cross_attention_dim": 12,
        "layers_per_block": 1, "sample_size": 8}


def levels(kind: str) -> dict:
    return {"down_block_types": [f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"],
            "up_block_types": [f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"]}


CLASSES = {
    "image": ("UNet2DConditionModel", {**TINY, **levels("2D"), "attention_head_dim": 2}),
    "motion": ("UNetMotionModel", {**TINY, **levels("Motion"), "num_attention_heads": 2,
                                   "motion_num_attention_heads": 2}),
    "3d": ("UNet3DConditionModel", {**TINY, **levels("3D"), "attention_head_dim": 8}),
}
B, T, H, W = 2, 3, 4, 6


def randomised(model, seed=0):
    """Every parameter redrawn: no layer is at zero, no norm's scale at one."""
    torch.manual_seed(seed)
    model.eval().requires_grad_(False)
    for name, value in model.named_parameters():
        noise = torch.randn_like(value)
        scale = 0.2 if value.ndim == 1 else value[0].numel() ** -0.5
        value.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight")
                    and value.ndim == 1 else scale * noise)
    return model


@pytest.fixture(scope="module")
def mesh():
    return MeshSpec().make(jax.devices()[:1])


class Case:
    def __init__(self, name, folder, mesh):
        kind, config = CLASSES[name]
        self.name, self.folder, self.mesh = name, folder, mesh
        with warnings.catch_warnings(action="ignore"):
            self.torch = randomised(getattr(diffusers, kind)(**config))
        self.torch.save_pretrained(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.model = Denoiser(*unet_from_config(self.config))
        self.params = load_unet(folder, self.model, mesh)

    def inputs(self, seed=0):
        rng = np.random.default_rng(seed)
        return (rng.normal(size=(B, T, H, W, 4)).astype(np.float32),
                np.array([7.0, 801.0], np.float32),
                rng.normal(size=(B, 5, 12)).astype(np.float32))

    def reference(self, x, time, tokens) -> np.ndarray:
        x, time, tokens = map(torch.from_numpy, (x, time, tokens))
        if self.name == "3d":
            y = self.torch(x.movedim(-1, 1), time, tokens).sample
        elif self.name == "motion":        # as the pipeline does: one text for each frame
            y = self.torch(x.movedim(-1, 1), time, tokens.repeat_interleave(T, 0)).sample
        else:
            y = self.torch(x.flatten(0, 1).movedim(-1, 1), time.repeat_interleave(T),
                           tokens.repeat_interleave(T, 0)).sample
            return y.movedim(1, -1).reshape(x.shape).numpy()
        return y.movedim(1, -1).numpy()


@pytest.fixture(scope="module", params=CLASSES)
def case(request, tmp_path_factory, mesh):
    return Case(request.param, tmp_path_factory.mktemp("unet"), mesh)


def run(case, quick, params, x, time, ports, model=None):
    model = model or case.model
    apply = jax.jit(lambda p, x, t, ports: model.run(p, x, t, ports), compiler_options=quick)
    return apply(params, x, time, ports)


def test_it_is_the_reference(case, quick):
    x, time, tokens = case.inputs()
    want = case.reference(x, time, tokens)
    got = run(case, quick, case.params, x, time, Ports(tokens=jnp.asarray(tokens)))
    assert want.std() > 0.1 and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_every_key_goes_there_and_back(case, tmp_path):
    save_unet(case.params, case.model, tmp_path / "back")
    there, back = (load_file(f / "diffusion_pytorch_model.safetensors")
                   for f in (case.folder, tmp_path / "back"))
    assert set(back) == set(there)
    for key, value in there.items():
        same = np.testing.assert_array_equal if "pos_embed" not in key else \
            np.testing.assert_allclose
        same(back[key], value, **({} if "pos_embed" not in key else {"atol": 1e-6}), err_msg=key)
    with warnings.catch_warnings(action="ignore"):
        again = type(case.torch).from_pretrained(tmp_path / "back")
    for key, value in case.torch.state_dict().items():
        np.testing.assert_allclose(again.state_dict()[key], value, atol=1e-6, err_msg=key)
