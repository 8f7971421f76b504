"""`vdx.load`: runs by the same call as pretrained weights, and what it refuses."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

import vdx
from vdx.config.build import ConfigError
from vdx.files import read_json, warn_once, write_json
from vdx.generate.manifest import RENAMED, RunWeights
from vdx.generate.run_pipeline import RunPipeline
from vdx.load_pipeline import load_for_manifest

PROMPT = "a red circle moves right"


@pytest.fixture(scope="module")
def pipeline(workdir):
    return vdx.load(workdir)


@pytest.fixture(scope="module")
def clip(pipeline):
    return pipeline(PROMPT, seed=3)


def test_import_vdx_is_cheap():
    code = "import sys, vdx; print({'jax', 'numpy', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "set()"


def test_public_names():
    assert all(getattr(vdx, name) is not None for name in vdx.__all__)
    assert dir(vdx) == vdx.__all__
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = vdx.lod


def test_a_clip_has_frames_and_a_manifest(clip, pipeline, workdir):
    assert isinstance(pipeline, vdx.Pipeline) and isinstance(clip, vdx.Clip)
    assert clip.frames.shape == (8, 32, 32, 3) and clip.frames.dtype == np.uint8
    assert (clip.fps, clip.prompt, clip.seed) == (8.0, PROMPT, 3)
    made = RunWeights(**clip.manifest["weights"])
    assert (made.workdir, made.step, made.item) == (str(workdir), 6, "ema")


def test_a_manifest_makes_the_same_clip_again(clip, pipeline, tmp_path):
    clip.save(tmp_path / "out.mp4")
    again = pipeline.remake(tmp_path / "out.json")
    np.testing.assert_array_equal(again.frames, clip.frames)
    assert again.manifest == clip.manifest
    with pytest.raises(ConfigError, match=r"out is not the name of a clip: expected"):
        clip.save(tmp_path / "out")


def test_a_prompt_that_is_cut_is_reported(pipeline, caplog):
    warn_once.cache_clear()
    pipeline.request([PROMPT, "a " * 50])
    assert [record.message for record in caplog.records] == [
        "1 of 2 prompts are longer than the 63 bytes that the text encoder reads, and are cut; "
        "the longest has 100."
    ]
    with pytest.raises(ConfigError, match="Prompt 1 is not text: character 2"):
        pipeline.request(["a\ud83d"])


def test_a_list_of_prompts_gives_a_list_of_clips(clip, pipeline):
    clips = pipeline([PROMPT, "a blue square moves up"], seed=3)
    assert [one.seed for one in clips] == [3, 4]
    np.testing.assert_allclose(clips[0].frames, clip.frames, atol=1)
    again = pipeline.remake(clips[1].manifest)
    np.testing.assert_array_equal(again.frames, clips[1].frames)
    assert again.seed == 4


def test_settings_decide_the_clip(clip, pipeline):
    other = pipeline(PROMPT, seed=3, steps=2, guidance=1.0, sampler="euler", num_frames=16, fps=4)
    assert other.frames.shape == (16, 32, 32, 3) and other.fps == 4.0
    request = other.manifest["request"]
    assert request["sampling"]["steps"] == 2 and request["sampling"]["sampler"] == "euler"
    plain = pipeline(PROMPT, seed=3, steps=None)  # None: the default of the model
    np.testing.assert_array_equal(plain.frames, clip.frames)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 3}, "Unknown setting 'step'. Did you mean 'steps'"),
        ({"guidence": 2.0}, "Did you mean 'guidance'"),
        ({"negative_prompt": "x"}, "Unknown setting 'negative_prompt'.* A trained model takes"),
        ({"depth": "x.npy"}, "not trained with the signal 'depth'; it reads: text"),
        ({"sampler": "dpm"}, "Did you mean 'ddpm'"),
        ({"num_frames": 7}, "num_frames = 7: .* multiples of the patch"),
        ({"guidance": "high"}, "sampling.guidance = 'high' is str, expected float"),
    ],
)
def test_settings_that_a_run_does_not_take_are_refused(settings, message, pipeline):
    with pytest.raises(ConfigError, match=message):
        pipeline(PROMPT, **settings)
    with pytest.raises(ConfigError, match="at least one prompt"):
        pipeline([])


def test_a_checkpoint_of_a_run(clip, workdir):
    step = vdx.load(workdir / "checkpoints" / "4")
    assert step.weights().step == 4
    assert vdx.load(workdir, step=4, averaged=False).weights().item == "params"
    with pytest.raises(ConfigError, match="names a step already"):
        vdx.load(workdir / "checkpoints" / "4", step=6)


def test_other_weights_than_the_manifests_are_refused(clip, workdir):
    with pytest.raises(ConfigError, match="not those of the manifest"):
        vdx.load(workdir, step=4).remake(clip.manifest)
    again = load_for_manifest(workdir, clip.manifest)
    assert isinstance(again, RunPipeline) and again.weights().step == 6


def test_paths_that_cannot_be_opened_are_explained(workdir, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere is not a folder. Give the workdir of a run"):
        vdx.load(tmp_path / "nowhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "clip.mp4").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"neither config.json nor model_index.json; .*clip.mp4"):
        vdx.load(tmp_path / "data")
    (tmp_path / "data" / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"layout of the original Wan: .* -m vdx.convert"):
        vdx.load(tmp_path / "data")
    with pytest.raises(ConfigError, match="is a run, which computes in its own"):
        vdx.load(workdir, dtype="bfloat16")


@pytest.mark.parametrize("old", RENAMED)
def test_renamed_keys_of_older_manifests_are_named(old, clip, pipeline):
    request = {**clip.manifest["request"]}
    section = request
    *path, last = old.split(".")
    for key in path:
        section[key] = {**section[key]}
        section = section[key]
    section[last] = 1
    with pytest.raises(ConfigError, match=f"request.{old} is now request.{RENAMED[old]}"):
        pipeline.remake({**clip.manifest, "request": request})


def test_a_file_that_is_no_manifest(pipeline, workdir):
    with pytest.raises(ConfigError, match=r"config.json is not a manifest of vdx.sample"):
        pipeline.remake(workdir / "config.json")


def test_a_run_that_cannot_be_what_it_was(workdir, tmp_path):
    """A config with an unknown key is refused when the run is opened."""
    copy = shutil.copytree(workdir, tmp_path / "copy")
    write_json(copy / "config.json", read_json(copy / "config.json") | {"sampl": {}})
    with pytest.raises(ConfigError, match="Did you mean 'sample'"):
        vdx.load(copy)
