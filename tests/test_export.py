"""From fine-tuning with previews to a file that other programs read, and clips drawn with it."""

import json

import diffusers
import jax
import numpy as np
import pytest
from safetensors.torch import load_file

from tests.command_line import run_here
from tests.test_finetune import LORA, ROOT, leaves, write_data
from tests.wan_pipelines import NETWORK, VAE, assembled, scheduler
from vdx.config.loader import resolve
from vdx.experiment import Experiment, load
from vdx.exporter import sample_request
from vdx.generate.latent_preview import open_around
from vdx.generate.pretrained_pipeline import PretrainedPipeline
from vdx.generate.video_io import read_video
from vdx.interop.keymap import WeightsError
from vdx.interop.lora import open_lora
from vdx.interop.safetensors import read_file
from vdx.main import train_and_evaluate
from vdx.train.preemption import PreemptionHandler
from vdx.weights import open_trained

PROMPTS = ("a cat walks", "the street")
SETTINGS = [
    "--config.train.steps=2",
    "--config.train.save_every=2",
    "--config.eval.loss=null",
    "--config.optim.warmup_steps=1",
    f"--config.train.sample_prompts={PROMPTS}",
]
# In float32, without guidance, at the times of the folder's scheduler: as a pretrained pipeline.
EXACT = [
    "--config.model.backbone.dtype=float32",
    "--config.optim.learning_rate=0.03",  # so that the adapters are seen in the pixels
    "--config.sample.guidance=1.0",
    "--config.sample.timesteps=diffusers_unipc",
    "--config.sample.shift=3.0",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole tiny Wan as diffusers saves it, with the transformer of the smoke configs."""
    path = tmp_path_factory.mktemp("model") / "Tiny-Wan"
    network = NETWORK | {"ffn_dim": 96}
    vae = VAE | {"num_res_blocks": 1}
    assembled(network, scheduler("unipc"), None, False, vae).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def train(tmp_path_factory, folder, mesh):
    """train(*options) -> the workdir of two steps on these weights."""
    data = write_data(tmp_path_factory.mktemp("data") / "latents")

    def run(*options, name=LORA):
        workdir = tmp_path_factory.mktemp(name)
        paths = [f"--config.weights={folder / 'transformer'}", f"--config.data.path={data}"]
        settings = [*SETTINGS, *paths, *options]
        experiment = Experiment(resolve(f"{ROOT}/configs/{name}.py:smoke", settings))
        with jax.set_mesh(mesh):
            train_and_evaluate(experiment, workdir, mesh, PreemptionHandler())
        return workdir

    return run


@pytest.fixture(scope="module")
def run(train):
    """The workdir of a run with previews."""
    return train()


def clips(path):
    return np.stack([read_video(path / f"{i:03d}.mp4")[0] for i in range(len(PROMPTS))])


def test_previews_change_no_bit_and_adapters_become_a_file(run, train, mesh, tmp_path, capsys):
    # The preview: a clip of each prompt, and a run without it ends with the same bits.
    rows = json.loads((run / "samples" / "00000002" / "samples.json").read_text())
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert clips(run / "samples" / "00000002").shape == (2, 9, 128, 128, 3)
    assert leaves(train("--config.train.sample_every=0"), 2) == leaves(run, 2)

    # The file, in both layouts.
    made = load(run)
    with jax.set_mesh(mesh):
        factors, *_ = open_trained(made, run, mesh)
    for layout in ("diffusers", "comfyui"):
        out = tmp_path / f"{layout}.safetensors"
        args = (f"--workdir={run}", f"--out={out}", f"--layout={layout}")
        ended = run_here(capsys, "vdx.export", *args)
        assert ended.code == 0, ended.err

        # Read by vdx, and by the loader of diffusers.
        read = open_lora(out, made.model).factors
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, x: x * (made.lora.scale if path[-1].key == "lora_b" else 1), factors
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), read, scaled)
        theirs = diffusers.WanPipeline.lora_state_dict(out)
        assert len(theirs) == 2 * 10 * 2
        assert all(key.startswith("transformer.blocks.") for key in theirs)

        # What it says of itself.
        said = read_file(out).metadata
        assert said["base_model"] == "Tiny-Wan" and said["rank"] == "4" and said["steps"] == "2"
        card = out.with_suffix(".md").read_text()
        assert "| base weights | Tiny-Wan |" in card and "16 training clips" in card
        assert ("LoraLoaderModelOnly" in card) == (layout == "comfyui")
        assert str(tmp_path) not in card and str(run) not in card


@pytest.mark.slow
def test_sample_clips_of_the_file_are_those_of_the_preview(train, folder, tmp_path, capsys):
    run = train(*EXACT)
    out = tmp_path / "lora.safetensors"
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    args = (f"--workdir={run}", f"--out={out}", f"--weights={folder}", *prompts)
    ended = run_here(capsys, "vdx.export", *args)
    assert ended.code == 0, ended.err
    preview = clips(run / "samples" / "00000002").astype(int)
    drawn = clips(tmp_path / "lora_clips").astype(int)
    pipeline = PretrainedPipeline(folder)
    without = pipeline.draw(sample_request(load(run), pipeline, PROMPTS, None))
    others = np.stack([clip.frames for clip in without]).astype(int)
    far = np.abs(others - preview[:, :, ::2, ::2]).mean()  # an mp4 repeats small pixels
    assert np.abs(drawn - preview).mean() < 0.5 and far > 5
    assert "(lora_clips/001.mp4) | the street |" in (tmp_path / "lora.md").read_text()


@pytest.mark.slow
def test_a_whole_network_becomes_a_folder(train, mesh, tmp_path, capsys):
    workdir = train("--config.train.sample_every=0", name="wan21_t2v_1p3b")
    out = tmp_path / "transformer"
    ended = run_here(capsys, "vdx.export", f"--workdir={workdir}", f"--out={out}")
    assert ended.code == 0, ended.err
    read = load(workdir)
    with jax.set_mesh(mesh):
        params, *_ = open_trained(read, workdir, mesh)
    written = load_file(out / "diffusion_pytorch_model.safetensors")
    theirs = diffusers.WanTransformer3DModel.from_config(
        json.loads((out / "config.json").read_text())
    )
    theirs.load_state_dict(written, strict=True)
    table = np.asarray(params["network"]["table"]).reshape(-1)
    np.testing.assert_array_equal(written["scale_shift_table"].reshape(-1), table)
    assert "WanTransformer3DModel" in (out / "README.md").read_text()


def test_a_transformer_without_its_model_has_no_preview(tmp_path):
    with pytest.raises(WeightsError, match="no VAE and text encoder next to it"):
        open_around(str(tmp_path / "transformer"))
    with pytest.raises(WeightsError, match="no part of a pretrained model"):
        open_around(None)
