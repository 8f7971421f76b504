"""Folders of the original Wan: other names and arrays in every file, and no configs."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from vdx.convert import open_source
from vdx.interop.clip import clip_vision_config
from vdx.interop.keymap import WeightsError
from vdx.interop.load import open_weights
from vdx.interop.pretrained import open_pretrained
from vdx.interop.stored_array import StoredArray
from vdx.interop.video_vae import VIDEO_VAES
from vdx.interop.wan_original import umt5_config, vae_config
from vdx.parallel import MeshSpec

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from tests.micro_run import command  # noqa: E402
from tests.parity.test_clip import save_pth, wan_clip  # noqa: E402
from tests.parity.test_t5 import wan_keys  # noqa: E402
from tests.parity.test_video_vae import original_key  # noqa: E402
from tests.parity.test_wan import original_names  # noqa: E402
from tests.wan_pipelines import (  # noqa: E402
    CLIP,
    NETWORK,
    PROMPT,
    TEXT,
    VACE,
    VISION,
    assembled,
    scheduler,
)

# Sizes on which no array depends are those of the published models: the width of a head (CLIP: 80),
# the distances of text, two residual blocks a level, the means and deviations of the latents.
HEAD = {"attention_head_dim": 128, "num_attention_heads": 1}
VAE = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 16}
VAE_22 = VIDEO_VAES["wan2.2"] | {"base_dim": 4, "decoder_base_dim": 6, "scale_factor_spatial": 16}
BROAD = VISION | {"hidden_size": 160}
FAR = TEXT | {"relative_attention_max_distance": 128}
LATENTS = {"in_channels": 16, "out_channels": 16}
# kind: (network, boundary, VAE, images, the VAE's file name, shift)
KINDS = {
    "i2v": (
        CLIP
        | HEAD
        | {"in_channels": 36, "out_channels": 16, "image_dim": 160, "added_kv_proj_dim": 128},
        None,
        VAE,
        1,
        "Wan2.1_VAE.pth",
        5.0,
    ),
    "a14b t2v": (NETWORK | HEAD | LATENTS, 0.875, VAE, 0, "Wan2.1_VAE.pth", 12.0),
    "5b": (
        NETWORK | HEAD | {"in_channels": 48, "out_channels": 48},
        None,
        VAE_22,
        0,
        "Wan2.2_VAE.pth",
        5.0,
    ),
    "vace": (
        VACE | HEAD | LATENTS | {"vace_in_channels": 96},
        None,
        VAE,
        0,
        "Wan2.1_VAE.pth",
        16.0,
    ),
}


def write_original(pipe, vae_name: str, folder: Path) -> Path:
    """Write the parts of a pipeline as the makers of Wan name and store them."""

    def arrays(part):
        return {key: value.numpy() for key, value in getattr(pipe, part).state_dict().items()}

    experts = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
    for part, name in experts.items() if pipe.transformer_2 else [("transformer", "")]:
        names = original_names(weights := arrays(part))
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(
            {names[key]: value for key, value in weights.items()},
            folder / name / "diffusion_pytorch_model.safetensors",
        )
    encoder = {
        key: value
        for key, value in arrays("text_encoder").items()
        if key != "encoder.embed_tokens.weight"
    }
    save_pth(wan_keys(encoder), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    vae = {original_key(key, pipe.vae.config): value for key, value in arrays("vae").items()}
    save_pth(vae, folder / vae_name)
    if getattr(pipe, "image_encoder", None):
        save_pth(
            wan_clip(arrays("image_encoder")),
            folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        )
    pipe.tokenizer.save_pretrained(folder / "google" / "umt5-xxl")
    return folder


@pytest.fixture(
    scope="module",
    params=[
        *(kind for kind in KINDS if kind != "vace"),
        pytest.param("vace", marks=pytest.mark.slow),
    ],
)
def original(request, tmp_path_factory):
    """Pipeline, folder of its original, and the shift of its kind."""
    network, boundary, vae, images, name, shift = KINDS[request.param]
    pipe = assembled(network, scheduler("unipc"), boundary, images, vae, BROAD, FAR)
    return pipe, write_original(pipe, name, tmp_path_factory.mktemp("Wan") / "original"), shift


@pytest.fixture(autouse=True)
def without_accelerate(monkeypatch):
    """With this list diffusers wants `accelerate`, to read in another type than the file's."""
    for network in (diffusers.WanTransformer3DModel, diffusers.WanVACETransformer3DModel):
        monkeypatch.setattr(network, "_keep_in_fp32_modules", None)


def test_an_original_folder_becomes_one_of_diffusers(original, tmp_path):
    pipe, folder, shift = original
    if pipe.transformer_2:  # as a user does
        done = command(
            "vdx.convert", f"--source={folder}", f"--out={tmp_path / 'out'}", "--to=diffusers"
        )
        assert f"Wrote {tmp_path / 'out'}" in done.stdout
    else:
        open_source(folder, {}).save(tmp_path / "out", own=False)
    assert open_pretrained(tmp_path / "out").official
    again = type(pipe).from_pretrained(tmp_path / "out")
    assert again.scheduler.config.flow_shift == shift
    for name in ("boundary_ratio", "expand_timesteps"):
        assert (again.config.get(name) or None) == (pipe.config.get(name) or None)
    assert again.tokenizer("a cat")["input_ids"] == pipe.tokenizer("a cat")["input_ids"]
    sizes = {
        "text_encoder": {k: v for k, v in FAR.items() if k != "dropout_rate"},
        "image_encoder": BROAD,
    }
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        read = getattr(again, name)
        want, got = part.state_dict(), read.state_dict()
        assert type(read) is type(part) and got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), name
        if name in sizes:
            assert {key: getattr(read.config, key) for key in sizes[name]} == sizes[name]
        else:
            configs = (
                {
                    k: list(v) if isinstance(v, tuple) else v
                    for k, v in m.config.items()
                    if k[0] != "_"
                }
                for m in (read, part)
            )
            assert next(configs) == next(configs), name


@pytest.mark.slow
@pytest.mark.parametrize("original", ["i2v"], indirect=True)
def test_in_vdx_layout_it_is_the_folder_of_diffusers(original, tmp_path):
    pipe, folder, _ = original
    pipe.save_pretrained(tmp_path / "diffusers")
    open_source(folder, {}).save(tmp_path / "own", own=True)
    mesh = MeshSpec().make(jax.devices()[:1])
    got, want = (
        {name: part.load(mesh) for name, part in open_pretrained(path).components.items()}
        for path in (tmp_path / "own", tmp_path / "diffusers")
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("original", ["i2v"], indirect=True)
def test_parts_that_are_missing_are_named_and_given_ones_are_taken(original, tmp_path):
    folder = original[1]
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    shutil.move(source / "google", tmp_path / "google")
    (vae,) = source.glob("*VAE.pth")
    shutil.move(vae, tmp_path / "vae.pth")
    with pytest.raises(
        WeightsError,
        match=r"(?s)It lacks:\n  tokenizer: google/umt5-xxl "
        r"\(--tokenizer=...\)\n  vae: Wan2",
    ):
        open_source(source, {})
    given = {"tokenizer": str(tmp_path / "google" / "umt5-xxl"), "vae": str(tmp_path / "vae.pth")}
    assert open_source(source, given).identity() == open_source(folder, {}).identity()
    next(source.glob("models_clip_*.pth")).unlink()
    with pytest.raises(WeightsError, match="an image_encoder of another width or none"):
        open_source(source, given)


def test_configs_are_those_of_the_arrays_in_either_layout(original):
    pipe, folder, _ = original

    def stored(arrays):
        return {
            key: StoredArray(Path(), np.dtype("float32"), tuple(value.shape), 0)
            for key, value in arrays.items()
        }

    other = stored({"x": torch.zeros(3), "conv2.weight": torch.zeros(4, 4, 1, 1, 1)})
    for part, name, config in (
        ("text_encoder", "models_t5_*.pth", umt5_config),
        ("image_encoder", "models_clip_*.pth", clip_vision_config),
        ("vae", "*VAE.pth", vae_config),
    ):
        if getattr(pipe, part, None):
            theirs = stored(getattr(pipe, part).state_dict())
            assert config(theirs) == config(open_weights(next(folder.glob(name))))
        with pytest.raises(WeightsError, match=r"These are not the weights of .* begin with x"):
            config(other)


@pytest.mark.slow
@pytest.mark.parametrize("original", ["i2v"], indirect=True)
def test_it_generates_the_clip_of_diffusers(original, tmp_path):
    """The two commands, from the makers' files to pixels."""
    pipe, folder, shift = original
    rng = np.random.default_rng(3)
    image_file = tmp_path / "image.png"
    image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((48, 32))
    image.save(image_file)
    noise = rng.normal(size=(1, 2, 4, 6, 16)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=shift)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        want = (
            np.asarray(
                pipe(
                    prompt=PROMPT,
                    negative_prompt="",
                    height=32,
                    width=48,
                    num_frames=5,
                    image=image,
                    num_inference_steps=3,
                    guidance_scale=4.0,
                    output_type="np",
                    latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
                ).frames
            )
            * 2
            - 1
        )
    command("vdx.convert", f"--source={folder}", f"--out={tmp_path / 'wan'}")
    command(
        "vdx.sample",
        f"--weights={tmp_path / 'wan'}",
        f"--prompt={PROMPT}",
        "--steps=3",
        "--guidance=4",
        "--num_frames=5",
        "--height=32",
        "--width=48",
        f"--image={image_file}",
        "--timesteps=diffusers_unipc",
        f"--shift={shift}",
        "--negative_prompt=",
        "--preprocess=diffusers",
        f"--init_noise={tmp_path / 'noise.npy'}",
        f"--out={tmp_path / 'out.mp4'}",
        f"--save_array={tmp_path / 'x.npy'}",
    )
    difference = 127.5 * np.abs(np.load(tmp_path / "x.npy") - want)
    assert want.std() > 0.1 and difference.mean() < 0.01 and difference.max() < 0.1
