"""The video VAE against AutoencoderKLWan with the same weights: whole, in chunks, tiled, split."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vdx.config.build import ConfigError
from vdx.generate.decode import Decoder
from vdx.generate.video_io import to_uint8
from vdx.interop.keymap import export, gather
from vdx.interop.video_vae import VIDEO_VAES, video_vae_from_config, video_vae_rows
from vdx.models.shapes import init_shapes
from vdx.models.vae.blocks import FrameAttention, ResidualBlock
from vdx.models.vae.posterior import Posterior
from vdx.models.vae.video_vae import VideoVAE
from vdx.parallel import MeshSpec, param_shardings

torch = pytest.importorskip("torch")
wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")

TINY = {
    "base_dim": 8,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.7, 1.0, 2.0],
}
CONFIGS = {
    "wan2.1": {**TINY, "attn_scales": [0.5]},
    "wan2.2": {
        **TINY,
        "decoder_base_dim": 12,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}
LIGHT = {
    "plain": {
        "base_dim": 8,
        "z_dim": 2,
        "dim_mult": (1, 1, 1),
        "num_res_blocks": 0,
        "temperal_downsample": (True, True),
    },
    "residual": {
        "base_dim": 8,
        "z_dim": 2,
        "dim_mult": (1, 1, 1),
        "num_res_blocks": 0,
        "temperal_downsample": (True, True),
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
    },
}
# Frames of a clip, and latent frames computed at a time: 17 frames, 5 latents, are 2 and 3 of them.
# The rest follows from what the light VAEs prove of chunks and of causality.
RUNS = (
    (17, 3),
    pytest.param(1, None, marks=pytest.mark.slow),
    pytest.param(9, None, marks=pytest.mark.slow),
)


def channels_last(x) -> np.ndarray:
    return x.detach().movedim(1, -1).numpy()


def channels_first(x):
    return torch.from_numpy(np.array(x)).movedim(-1, 1)


def reference(config):
    """AutoencoderKLWan with no parameter at its initial value."""
    torch.manual_seed(0)
    model = wan.AutoencoderKLWan(**config).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        noise = torch.randn_like(value)
        value.copy_(
            1 + 0.1 * noise
            if "gamma" in name
            else 0.2 * noise
            if value.ndim == 1
            else noise / value[0].numel() ** 0.5
        )
    for block in model.modules():
        if isinstance(block, wan.WanAttentionBlock):  # it cannot take what its levels give it
            block.forward = lambda x, f=block.forward, **_: f(x)
    return model


class CompiledVAE:
    """Runs a VAE's methods on clips of its own, each program compiled once."""

    def __init__(self, vae, params):
        self.vae, self.params = vae, params
        rng, (_, side) = np.random.default_rng(0), vae.rates
        self.video = np.tanh(rng.normal(size=(2, 17, 2 * side, 3 * side, 3))).astype(np.float32)
        self.latents = rng.normal(size=(2, 5, 2, 3, vae.z_dim)).astype(np.float32)
        self.run = functools.cache(self._run)

    def input(self, method, length):
        return self.video[:, :length] if method == "encode" else self.latents[:, : length // 4 + 1]

    def call(self, method, x, *args):
        """(output of `method`, bytes of temporaries)"""
        program = (
            jax.jit(
                lambda p, x: self.vae.apply({"params": p}, x, *args, method=method),
            )
            .lower(self.params, x)
            .compile()
        )
        return program(self.params, x), program.memory_analysis().temp_size_in_bytes

    def _run(self, method, length, chunk=None):
        """(pixels or normalised latents of a clip of `length` frames, bytes of temporaries)"""
        y, memory = self.call(method, self.input(method, length), chunk)
        return y.mode() if method == "encode" else y, memory


class Case:
    """A reference, its files, and our VAE with the weights read from them."""

    def __init__(self, config, folder):
        self.torch = reference(config)
        self.torch.save_pretrained(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.file = load_file(folder / "diffusion_pytorch_model.safetensors")
        self.vae = video_vae_from_config(self.config)
        self.rows = video_vae_rows(self.vae)
        self.like = shapes(self.vae)
        self.params = gather(self.file.get, self.file, self.like, self.rows)
        self.ours = CompiledVAE(self.vae, self.params)
        self.mean, self.std = (np.float32(config[f"latents_{k}"]) for k in ("mean", "std"))


def shapes(vae):
    return init_shapes(vae, jnp.zeros((1, 1, 16, 16, 3)))


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    return Case(CONFIGS[request.param], tmp_path_factory.mktemp("vae"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name == "residual" else []) for name in LIGHT
    ],
)
def light(request, randomise):
    """All kinds of layers, few of each: what does not need a reference is tested on it."""
    vae = VideoVAE(**LIGHT[request.param])
    params = randomise(shapes(vae))
    params["decoder"]["conv_out"]["kernel"] /= 4  # pixels of the size of pixels
    return CompiledVAE(vae, params)


@pytest.mark.parametrize(("length", "chunk"), RUNS)
def test_encoder_is_the_references(case, length, chunk):
    x = case.ours.input("encode", length)
    want = case.torch.encode(channels_first(x)).latent_dist
    got, _ = case.ours.call("encode", x, chunk)
    for ours, theirs in ((got.mean, want.mean), (got.logvar, want.logvar)):
        assert theirs.std() > 0.1  # there is something to compare
        np.testing.assert_allclose(ours, channels_last(theirs), atol=1e-5, rtol=0)
    np.testing.assert_allclose(
        got.mode(), (channels_last(want.mean) - case.mean) / case.std, atol=2e-5, rtol=0
    )


@pytest.mark.parametrize(("length", "chunk"), RUNS)
def test_decoder_is_the_references(case, length, chunk):
    z = case.ours.input("decode", length)
    want = channels_last(case.torch.decode(channels_first(z * case.std + case.mean)).sample)
    assert np.mean(np.abs(want) < 1) > 0.7 and want.std() > 0.2  # the reference clips
    got, _ = case.ours.call("decode", z, chunk)
    assert got.shape == want.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(np.clip(got, -1, 1), want, atol=2e-5, rtol=0)


def is_the_start_of_the_whole(light, method, length):
    whole, _ = light.run(method, 17)
    got, _ = light.run(method, length, 1)
    assert got.shape[1] == 1 + (length - 1) // (4 if method == "encode" else 1)
    np.testing.assert_allclose(got, whole[:, : got.shape[1]], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_clip_of_one_chunk_or_two_is_the_whole(light, method, length):
    is_the_start_of_the_whole(light, method, length)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_chunks_are_the_whole_in_bounded_memory(light, method):
    _, whole_memory = light.run(method, 17)
    for length in (9, 17):
        is_the_start_of_the_whole(light, method, length)
    assert light.run(method, 17, 1)[1] < 1.01 * light.run(method, 9, 1)[1]
    assert whole_memory > 1.25 * light.run(method, 9)[1]  # what it would be otherwise


@pytest.mark.parametrize(
    ("latents", "chunk", "sizes"),
    [
        (5, 2, [1, 8, 8]),
        pytest.param(1, 2, [1], marks=pytest.mark.slow),
        pytest.param(4, 2, [5, 8], marks=pytest.mark.slow),
    ],
)
def test_pieces_for_the_screen_are_the_clip(light, decoder, latents, chunk, sizes):
    """The bytes that the whole clip gives on the host; the next piece is begun before one is
    given, and no further one."""
    exact, screen = decoder(chunk)
    z, begun = light.latents[0, :latents], []
    screen.later = lambda *args, f=screen.later: begun.append(None) or f(*args)
    pieces = []
    for number, piece in enumerate(screen(z)):
        assert len(begun) == min(number + 1, len(sizes) - 1)
        pieces.append(piece)
    assert [len(piece) for piece in pieces] == sizes and pieces[0].dtype == np.uint8
    want, _ = light.call("decode", z[None], chunk)
    np.testing.assert_array_equal(np.concatenate(list(exact(z))), np.clip(want[0], -1, 1))
    np.testing.assert_array_equal(np.concatenate(pieces), to_uint8(want[0]))


@pytest.fixture(scope="module")
def decoder(light):
    @functools.cache
    def make(chunk):
        return [Decoder(light.vae, light.params, chunk, exact) for exact in (True, False)]

    return make


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_time_is_causal(light, method):
    """A clip's start is computed as if nothing came after it."""
    (short, _), (whole, _) = light.run(method, 9), light.run(method, 17)
    np.testing.assert_allclose(short, whole[:, : short.shape[1]], atol=1e-5, rtol=0)
    assert np.abs(whole[:, 1] - whole[:, 2]).max() > 0.05


def test_norms_are_the_references_for_small_values():
    """Wan's norm has no epsilon to speak of: ours must not push small activations down."""
    x = (1e-4 * np.random.default_rng(0).normal(size=(1, 3, 4, 4, 8))).astype(np.float32)
    for ours, theirs, args in (
        (ResidualBlock(8), wan.WanResidualBlock(8, 8), (True,)),
        (FrameAttention(), wan.WanAttentionBlock(8), ()),
    ):
        state = {k: v.numpy() for k, v in theirs.state_dict().items()}
        name = "res_0" if args else "attention_0"
        prefix = "mid_block.resnets.0." if args else "mid_block.attentions.0."
        rows = [r for r in video_vae_rows(VideoVAE()) if r.source.startswith("encoder." + prefix)]
        like = init_shapes(ours, x, *args)
        params = gather(
            lambda k, s=state, p=prefix: s[k.removeprefix("encoder." + p)],
            [f"encoder.{prefix}{k}" for k in state],
            {"encoder": {"middle": {name: like}}},
            rows,
        )
        got = ours.apply({"params": params["encoder"]["middle"][name]}, x, *args)
        want = channels_last(theirs(channels_first(x)))
        assert np.abs(want - x).max() > 0.1
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_every_key_goes_there_and_back(case):
    back = dict(export(case.params, case.rows))
    assert set(back) == set(case.file)
    for key, value in case.file.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def original_key(key: str, config) -> str:
    """The Wan team's name of a key of diffusers."""
    residual = config.get("is_residual", False)
    blocks = config["num_res_blocks"]

    def up(match):
        i, j = int(match[1]), blocks + 1 if "upsampler" in match[2] else int(match[3])
        return (
            f".upsamples.{i}.upsamples.{j}." if residual else f".upsamples.{i * (blocks + 2) + j}."
        )

    def down(match):
        return f".downsamples.{match[1]}.downsamples." + (
            f"{blocks}." if "downsampler" in match[2] else f"{match[3]}."
        )

    for old, new in (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"\.conv_shortcut\.", ".shortcut."),
        (r"\.norm1\.", ".residual.0."),
        (r"(blocks|resnets)(\.\d+)\.conv1\.", r"\1\2.residual.2."),
        (r"\.norm2\.", ".residual.3."),
        (r"\.conv2\.", ".residual.6."),
        (r"\.conv_in\.", ".conv1."),
        (r"\.norm_out\.", ".head.0."),
        (r"\.conv_out\.", ".head.2."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.1\.", ".middle.2."),
        (r"\.up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0|upsampler)\.", up),
        *(
            [(r"\.down_blocks\.(\d+)\.(resnets\.(\d+)|downsampler)\.", down)]
            if residual
            else [(r"\.down_blocks\.(\d+)\.", r".downsamples.\1.")]
        ),
    ):
        key = re.sub(old, new, key)
    return key


def test_the_original_layout(case, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "Wan_VAE.safetensors"
    save_file({original_key(k, case.config): v for k, v in case.file.items()}, path)
    file, rows = load_file(path), video_vae_rows(case.vae, original=True)
    got = gather(file.get, file, case.like, rows)
    jax.tree.map(np.testing.assert_array_equal, got, case.params)
    assert set(dict(export(got, rows))) == set(file)


@pytest.mark.parametrize(
    ("name", "millions", "keys"),
    [
        (
            "wan2.1",
            127,
            {
                "encoder.downsamples.0.residual.2.weight",
                "decoder.middle.0.residual.6.bias",
                "encoder.downsamples.3.shortcut.weight",
                "decoder.upsamples.4.shortcut.weight",
                "encoder.downsamples.5.time_conv.weight",
                "decoder.head.2.weight",
                "decoder.upsamples.7.time_conv.bias",
                "decoder.upsamples.11.resample.1.bias",
                "conv1.weight",
                "conv2.bias",
                "encoder.middle.1.to_qkv.weight",
            },
        ),
        (
            "wan2.2",
            705,
            {
                "encoder.downsamples.2.downsamples.2.time_conv.weight",
                "decoder.upsamples.0.upsamples.3.time_conv.weight",
                "decoder.upsamples.2.upsamples.0.shortcut.weight",
                "decoder.upsamples.1.upsamples.2.residual.3.gamma",
            },
        ),
    ],
)
def test_public_sizes_names_and_sharding(name, millions, keys):
    vae = video_vae_from_config(VIDEO_VAES[name])
    like = shapes(vae)
    assert round(sum(p.size for p in jax.tree.leaves(like)) / 1e6) == millions
    zeros = jax.tree.map(lambda p: np.broadcast_to(np.float32(0), p.shape), like)
    names = {key for key, _ in export(zeros, video_vae_rows(vae, original=True))}
    assert keys <= names and len(names) == len(jax.tree.leaves(like))
    for spec in ({"fsdp": 8}, {"tensor": 8}, {"fsdp": 4, "tensor": 2}):
        param_shardings(MeshSpec(**{"data": 1, **spec}).make(), like)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "is of AutoencoderKL, expected AutoencoderKLWan"),
        ({"temporal_downsample": [True]}, "Did you mean 'temperal_downsample'"),
        ({"temperal_downsample": [True, True]}, "one entry for each of the 3 steps"),
        ({"z_dim": 48}, "latents_mean and latents_std must have z_dim = 48 entries, not 16 and 16"),
        (
            {"is_residual": True, "attn_scales": [1.0]},
            "attn_scales has no meaning with is_residual",
        ),
        ({"patch_size": 2}, "must be multiples of patch_size 2 squared"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial = 16, but the levels reduce by 8"),
        ({"base_dim": "96"}, "vae.base_dim = '96' is str, expected int"),
    ],
)
def test_a_config_that_cannot_be_meant(fields, message):
    with pytest.raises(ConfigError, match=message):
        video_vae_from_config(fields)


def test_an_empty_config_is_wan21():
    assert video_vae_from_config(
        {
            "dropout": 0.0,
            "clip_output": False,  # as public ones say
            "_diffusers_version": "0.33",
        }
    ) == video_vae_from_config(VIDEO_VAES["wan2.1"])
    assert video_vae_from_config(VIDEO_VAES["wan2.1"]).rates == (4, 8)
    assert video_vae_from_config(VIDEO_VAES["wan2.2"]).rates == (4, 16)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 16, 16, 3), r"cut it to 1 \+ 4n frames .* such as 1 of 16 x 16"),
        ((1, 7, 12, 16, 3), r"multiples of 8, such as 5 of 8 x 16"),
    ],
)
def test_clips_that_do_not_divide(shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: VideoVAE().init(jax.random.key(0), x), jnp.zeros(shape))


def test_a_chunk_of_nothing(light):
    with pytest.raises(ValueError, match="chunk = 0 latent frames must be positive"):
        light.run("decode", 5, 0)


@pytest.mark.parametrize("light", ["residual"], indirect=True)
def test_tiles_are_the_vae_on_tiles(light):
    """Where one tile alone covers the frame, its pixels are there; elsewhere tiles are blended."""
    side, x = light.vae.rates[1], light.video[:1, :1]
    z = np.concatenate([light.latents, light.latents[..., ::-1, :]], 3)[:1, :1]  # 2 x 6
    got, _ = light.call("decode_tiled", z, 3, 1)  # from columns 0, 1 and 3
    first, _ = light.call("decode", z[..., :3, :])
    np.testing.assert_allclose(got[..., :side, :], first[..., :side, :], atol=1e-5, rtol=0)
    assert got.shape[-3:-1] == (2 * side, 6 * side)
    got, _ = light.call("encode_tiled", x, (2 * side, 2 * side), side)
    first, _ = light.call("encode", x[..., : 2 * side, :])
    assert got.mean.shape[-3:-1] == (2, 3)
    for tiles, one in ((got.mean, first.mean), (got.logvar, first.logvar)):
        np.testing.assert_allclose(tiles[..., :1, :], one[..., :1, :], atol=1e-5, rtol=0)


def test_split_over_space_is_one_device(light):
    """Six rows do not divide over four devices, four columns do; deeper, twelve rows do."""
    z = np.random.default_rng(1).normal(size=(2, 2, 6, 4, 2)).astype(np.float32)
    want, whole = light.call("decode", z)
    with jax.set_mesh(MeshSpec(data=2, context=4).make()):
        got, memory = light.call("decode", z)
    assert len({str(shard.index) for shard in got.addressable_shards}) == 8
    assert memory < whole / 3
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_gradients_split_over_space_are_those_of_one_device(light):
    """On the way down rows, then columns are what divides: a kernel's gradient sums over both."""
    side = light.vae.rates[1]
    video = np.random.default_rng(1).normal(size=(2, 5, 6 * side, 4 * side, 3)).astype(np.float32)

    def grads():
        def loss(params, video):
            pixels, posterior = light.vae.apply({"params": params}, video)
            return jnp.square(pixels - video).mean() + posterior.kl().mean()

        return jax.jit(jax.grad(loss))(light.params, video)

    want = grads()
    with jax.set_mesh(MeshSpec(data=2, context=4).make()):
        got = grads()
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True
    ):
        assert np.abs(a - b).max() < 1e-4 * np.abs(a).max() + 1e-8, path


def test_every_parameter_learns(randomise):
    vae = VideoVAE(
        base_dim=4, z_dim=2, dim_mult=(1, 2), num_res_blocks=1, temperal_downsample=(True,)
    )
    video = np.tanh(np.random.default_rng(0).normal(size=(1, 3, 8, 8, 3))).astype(np.float32)
    made = jax.eval_shape(vae.init, jax.random.key(0), video)
    assert set(made) == {"params"}  # history is no parameter
    params = randomise(made["params"])

    def loss(params):
        pixels, posterior = vae.apply({"params": params}, video, jax.random.key(1))
        return jnp.square(pixels - video).mean() + 1e-3 * posterior.kl().mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, path


@pytest.mark.parametrize("light", ["residual"], indirect=True)
def test_bfloat16_products_of_float32_parameters(light):
    half = CompiledVAE(light.vae.clone(dtype="bfloat16"), light.params)
    assert {p.dtype for p in jax.tree.leaves(shapes(half.vae))} == {np.dtype(np.float32)}
    (want, _), (got, _) = light.run("decode", 9), half.run("decode", 9)
    assert got.dtype == jnp.float32
    assert 1e-4 < np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_posterior_is_the_references():
    moments = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 8)).astype(np.float32)
    moments[0, 0, 0, 0] = 50  # the variance is held
    shift, scale = np.arange(4, dtype=np.float32), np.float32([1, 2, 3, 4])
    got = Posterior.from_moments(moments, shift, scale)
    want = wan.DiagonalGaussianDistribution(channels_first(moments))
    np.testing.assert_array_equal(got.mean, channels_last(want.mean))
    np.testing.assert_array_equal(got.logvar, channels_last(want.logvar))
    kl = 0.5 * (want.mean**2 + want.var - 1 - want.logvar).flatten(1).sum(1)
    np.testing.assert_allclose(got.kl(), kl, rtol=1e-5)
    key = jax.random.key(3)
    noise = jax.random.normal(key, got.mean.shape)
    np.testing.assert_allclose(
        np.asarray(got.sample(key)) * scale + shift,
        got.mean + channels_last(want.std) * noise,
        rtol=1e-5,
        atol=1e-5,
    )
