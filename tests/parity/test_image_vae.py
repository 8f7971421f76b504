"""The image VAE against AutoencoderKL with the same weights, over images and over clips."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vdx.config.build import ConfigError
from vdx.interop.image_vae import image_vae_from_config, image_vae_rows
from vdx.interop.keymap import WeightsError, assign, export, gather
from vdx.models.image_blocks import GroupNorm
from vdx.models.shapes import init_shapes
from vdx.models.vae.image_vae import ImageVAE
from vdx.parallel import MeshSpec, param_shardings

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TINY = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
CONFIGS = {
    "sd": {**TINY, "layers_per_block": 2},
    "flux": {
        **TINY,
        "latent_channels": 6,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no_attention": {**TINY, "mid_block_add_attention": False},
}
LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def channels_last(x) -> np.ndarray:
    return x.detach().movedim(1, -1).numpy()


def channels_first(x):
    return torch.from_numpy(np.array(x)).movedim(-1, 1)


def shapes(vae):
    return init_shapes(vae, jnp.zeros((1, 8, 8, 3)))


class Case:
    def __init__(self, config, folder):
        torch.manual_seed(0)
        self.torch = diffusers.AutoencoderKL(**config).eval().requires_grad_(False)
        for name, value in self.torch.named_parameters():
            noise = torch.randn_like(value)
            value.copy_(
                1 + 0.1 * noise
                if "norm" in name and name.endswith("weight")
                else 0.2 * noise
                if value.ndim == 1
                else noise / value[0].numel() ** 0.5
            )
        self.torch.save_pretrained(folder)
        self.file = load_file(folder / "diffusion_pytorch_model.safetensors")
        self.vae = image_vae_from_config(json.loads((folder / "config.json").read_text()))
        self.params = gather(self.file.get, self.file, shapes(self.vae), image_vae_rows())


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name == "flux" else []) for name in CONFIGS
    ],
)
def case(request, tmp_path_factory):
    return Case(CONFIGS[request.param], tmp_path_factory.mktemp("vae"))


def test_encode_and_decode_are_the_references(case):
    rng, vae = np.random.default_rng(0), case.vae
    video = np.tanh(rng.normal(size=(2, 3, 8, 12, 3))).astype(np.float32)
    frames = video.reshape(6, 8, 12, 3)
    z = rng.normal(size=(2, 3, 4, 6, vae.latent_channels)).astype(np.float32)
    encode, decode = (
        jax.jit(lambda p, x, m=m: vae.apply({"params": p}, x, method=m))
        for m in ("encode", "decode")
    )

    want, got = case.torch.encode(channels_first(frames)).latent_dist, encode(case.params, video)
    for ours, theirs in ((got.mean, want.mean), (got.logvar, want.logvar)):
        assert ours.shape == z.shape and theirs.std() > 0.2
        np.testing.assert_allclose(
            ours.reshape(6, 4, 6, -1), channels_last(theirs), atol=1e-5, rtol=0
        )
    scale, shift = vae.scaling_factor, vae.shift_factor or 0.0
    np.testing.assert_allclose(got.mode(), (got.mean - shift) * scale, atol=1e-6)

    raw = z.reshape(6, 4, 6, -1) / scale + shift  # as the pipelines do
    want, got = channels_last(case.torch.decode(channels_first(raw)).sample), decode(case.params, z)
    assert want.std() > 0.2 and got.shape == video.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", ["no_attention"], indirect=True)
def test_images_are_clips_of_one_frame(case):
    image = np.tanh(np.random.default_rng(1).normal(size=(1, 8, 8, 3))).astype(np.float32)
    run = jax.jit(lambda p, x: case.vae.apply({"params": p}, x))
    (one, posterior), (clip, _) = run(case.params, image), run(case.params, image[None])
    assert one.shape == image.shape and posterior.kl().shape == (1,)
    np.testing.assert_allclose(one, clip[0], atol=1e-6)


def test_every_key_goes_there_and_back(case):
    back = dict(export(case.params, image_vae_rows()))
    assert set(back) == set(case.file)
    for key, value in case.file.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_the_older_names_of_attention(case):
    older = {}
    for key, value in case.file.items():
        for new, old in LEGACY.items():
            key = key.replace(f".{new}.", f".{old}.")
        older[key] = value
    assert (set(older) != set(case.file)) == case.vae.mid_block_add_attention
    got = gather(older.get, older, shapes(case.vae), image_vae_rows())
    jax.tree.map(np.testing.assert_array_equal, got, case.params)


def test_both_names_at_once_are_an_error(case):
    key = "decoder.mid_block.attentions.0.query.weight"
    with pytest.raises(WeightsError, match=f"{key}: .* (already filled|has no)"):
        assign([*case.file, key], shapes(case.vae), image_vae_rows())


def test_norm_keeps_frames_apart_and_survives_a_large_mean():
    rng = np.random.default_rng(0)
    x = (1000 + rng.normal(size=(2, 4, 4, 8))).astype(np.float32)
    x[1] *= 1e-2
    norm = torch.nn.GroupNorm(4, 8, eps=1e-6).double()
    want = channels_last(norm(channels_first(x).double()))
    got = GroupNorm(4).apply(GroupNorm(4).init(jax.random.key(0), x), x)
    np.testing.assert_allclose(got, want, atol=1e-3)  # 1000 has four digits after it
    np.testing.assert_allclose(got.std(), 1, atol=0.1)


def test_the_public_size_and_its_sharding():
    like = shapes(ImageVAE())
    assert round(sum(p.size for p in jax.tree.leaves(like)) / 1e6) == 84
    for spec in ({"fsdp": 8}, {"tensor": 8}):
        param_shardings(MeshSpec(**{"data": 1, **spec}).make(), like)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "is of AutoencoderKLWan, expected AutoencoderKL:"),
        ({"act_fn": "gelu"}, "vae.act_fn = 'gelu' is not supported, only 'silu'"),
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
            "down_block_types",
        ),
        ({"latents_mean": [0.0] * 4}, "latents_mean .* is not supported, only None"),
        ({"latent_chanels": 4}, "Did you mean 'latent_channels'"),
    ],
)
def test_a_config_that_cannot_be_meant(fields, message):
    with pytest.raises(ConfigError, match=message):
        image_vae_from_config(fields)


def test_sizes_that_do_not_divide():
    vae = ImageVAE(block_out_channels=(8, 16), norm_num_groups=4)
    with pytest.raises(ValueError, match=r"Frames of 8 x 9 .* multiples of 2"):
        jax.eval_shape(lambda: vae.init(jax.random.key(0), jnp.zeros((1, 8, 9, 3))))
    with pytest.raises(ConfigError, match="multiples of norm_num_groups 32"):
        shapes(ImageVAE(block_out_channels=(8, 16)))
