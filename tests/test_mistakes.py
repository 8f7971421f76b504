"""Mistakes at the command line end in a message: what was given, what was expected, what to do."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import run_here
from tests.micro_run import MICRO, ROOT, command
from vdx.config.loader import resolve
from vdx.files import write_json

TINY = f"--config={ROOT}/configs/t2v_tiny.py"
FOLDER = f"--config={ROOT}/configs/t2v_folder.py"
RUN = "--workdir={at}/run"  # a workdir with a config and no checkpoints
LORA = "--workdir={at}/lora_run"  # the same of adapters
WAN = "--workdir={at}/wan_run"  # the same of a Wan, all of it trained
NEW = "--workdir={at}/new"
PROMPT = "--prompt=a red circle"
USAGE = 2

CONFIGS = {
    "syntax": "def get_config(:\n",
    "name": "\n\n\ndef get_config():\n    return ConfigDct()\n",
    "import": "\nimport no_such_package\n",
    "relative": "from configs import no_such_config\n",
    "empty": "",
    "returns": "def get_config():\n    return {}\n",
    "plain": "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n",
    "values": "from ml_collections import ConfigDict\n"
    "def get_config():\n    return ConfigDict({'data': {'source': lambda: 1}})\n",
    "exits": "def get_config():\n    raise KeyError('seed')\n",
}
MANIFESTS = {
    "half": '{"request": ',
    "list": "[]",
    "no_request": '{"weights": null}',
    "text_request": '{"request": "a", "weights": null}',
    "no_prompts": '{"request": {"seed": 1}, "weights": null}',
    "text_prompts": '{"request": {"prompts": "abc"}, "weights": null}',
    "no_weights": '{"request": {"prompts": ["a"]}, "weights": null}',
    "text_weights": '{"request": {"prompts": ["a"]}, "weights": "x"}',
}


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with the files that the mistakes are about."""
    at = tmp_path_factory.mktemp("at")
    for name, text in CONFIGS.items():
        (at / f"{name}.py").write_text(text)
    (at / "binary.py").write_bytes(b"\x00\xff\xfe")
    for name, text in MANIFESTS.items():
        (at / f"{name}.json").write_text(text)
    (at / "binary.json").write_bytes(b"\xff\xfe\x00\x01")

    (at / "file").write_text("")
    (at / "empty").mkdir()
    (at / "full").mkdir()
    (at / "full" / "file").write_text("")
    (at / "clip.mp4").mkdir()
    (at / "empty.txt").write_text("\n \n")
    (at / "cp1252.txt").write_text("a red circle\nein größerer Kreis", "cp1252")

    config = resolve(f"{ROOT}/configs/t2v_tiny.py", MICRO)
    config["eval"] = {"loss": {"every": 3, "clips": 8}}
    config["data"]["mean"] = 0.0
    for name in ("run", "half_run", "list_run", "typo_run", "lora_run", "wan_run"):
        (at / name).mkdir()
    write_json(at / "lora_run" / "config.json", config | {"lora": {"rank": 4}})
    wan = resolve(f"{ROOT}/configs/wan21_t2v_1p3b.py:smoke", [])
    write_json(at / "wan_run" / "config.json", wan)
    write_json(at / "run" / "config.json", config)
    (at / "half_run" / "config.json").write_text('{"data":')
    write_json(at / "list_run" / "config.json", [])
    write_json(at / "typo_run" / "config.json", config | {"modle": {}})

    (at / "model").mkdir()
    (at / "model" / "model_index.json").write_text('{"_class_name":')
    (at / "other").mkdir()
    write_json(at / "other" / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    (at / "weights.safetensors").write_bytes(b"not weights")
    return at


# Command line -> exit code, what the message contains.
MISTAKES = [
    # Flags of every program
    (("vdx.main",), USAGE, "--config is missing.*--workdir is missing"),
    (("vdx.main", NEW), USAGE, "--config is missing. The experiment, e.g. configs/t2v_tiny.py"),
    (("vdx.main", TINY), USAGE, "--workdir is missing. The folder of checkpoints"),
    (("vdx.main", TINY, "--workdir="), USAGE, "--workdir is missing"),
    (("vdx.main", "--confg=x", NEW), USAGE, "'confg'. Did you mean: config"),
    (("vdx.main", TINY, NEW, "train"), USAGE, r"Unknown arguments \['train'\]"),
    (("vdx.main", TINY, NEW, "--config.train.steps", "10"), USAGE, "has no value"),
    (("vdx.main", TINY, NEW, "--heartbeat=0"), USAGE, "heartbeat"),
    (("vdx.main", TINY, NEW, "--heartbeat=long"), USAGE, "heartbeat"),
    (("vdx.main", TINY, NEW, "--distributed=perhaps"), USAGE, "distributed"),
    (("vdx.main", TINY, NEW, "--process_id=1"), USAGE, "need --coordinator=HOST:PORT"),
    (("vdx.main", TINY, NEW, "--coordinator=here"), USAGE, "is not like host:1234"),
    (("vdx.main", TINY, NEW, "--coordinator=here:1"), USAGE, "needs --num_processes=N"),
    (
        ("vdx.main", TINY, NEW, "--coordinator=a:1", "--num_processes=2", "--process_id=2"),
        USAGE,
        "from 0 to N - 1",
    ),
    (("vdx.main", "--flagfile={at}/none"), USAGE, "none"),
    (("vdx.sample",), USAGE, "Give --workdir, the workdir of a run of vdx.main, or --weights"),
    (("vdx.sample", RUN, "--weights=x", PROMPT), USAGE, "Give --workdir, .* or --weights"),
    (("vdx.sample", RUN, "--promt=x"), USAGE, "'promt'. Did you mean: prompt"),
    (("vdx.sample", RUN, "--prompt=a", "red", "circle"), USAGE, r"\['red', 'circle'\].*in quotes"),
    (("vdx.sample", RUN), USAGE, "one of --prompt, --prompts_file and --from_manifest"),
    (("vdx.sample", RUN, "--prompt="), USAGE, "--prompt is empty"),
    (("vdx.sample", RUN, PROMPT, "--prompts_file=x"), USAGE, "Give one of --prompt"),
    (("vdx.sample", RUN, PROMPT, "--steps=ten"), USAGE, "--steps=ten"),
    (("vdx.sample", RUN, PROMPT, "--steps=0"), USAGE, "--steps=0"),
    (("vdx.sample", RUN, PROMPT, "--num_frames=-8"), USAGE, "--num_frames=-8"),
    (("vdx.sample", RUN, PROMPT, "--dtype=float32"), USAGE, "--dtype: not with --workdir"),
    (("vdx.sample", "--weights=x", PROMPT, "--dtype=half"), USAGE, "--dtype=half"),
    (("vdx.sample", "--weights=x", PROMPT, "--step=1"), USAGE, "--step: not with --weights"),
    (("vdx.sample", RUN, PROMPT, "--guidance=high"), USAGE, "--guidance=high is not a number"),
    (("vdx.sample", RUN, PROMPT, "--signal_guidance=x"), USAGE, "--signal_guidance=x is not like"),
    (("vdx.sample", RUN, PROMPT, "--control=deph=x.npy"), USAGE, "--control=deph=x.npy is not"),
    (("vdx.sample", "--weights=x", PROMPT, "--mesh=4"), USAGE, "--mesh=4 is not like fsdp=4"),
    (("vdx.sample", RUN, "--calibrate_cache=0.9", "--out=x.mp4"), USAGE, "--out: not with"),
    (("vdx.evaluate",), USAGE, "--workdir is missing"),
    (("vdx.evaluate", "--wokdir=x"), USAGE, "'wokdir'. Did you mean: workdir"),
    (("vdx.evaluate", "{at}/run"), USAGE, "Unknown arguments"),
    (("vdx.convert",), USAGE, "--source is missing.*--out is missing"),
    (("vdx.convert", "--source=x", "--out=y", "--to=torch"), USAGE, "--to=torch"),
    (("vdx.export",), USAGE, "--workdir is missing.*--out is missing"),
    (("vdx.export", RUN, "--out=x", "--layout=peft"), USAGE, "--layout=peft"),
    (("vdx.export", RUN, "--out=x", PROMPT), USAGE, "--prompt and --weights go together"),
    (("vdx.export", RUN, "--out=x", "--weights=y"), USAGE, "--prompt and --weights go together"),
    (("vdx.export", RUN, "--out=x", "--image=y"), USAGE, "--image only with them"),
    (("vdx.export", RUN, "--out=x", "--weights=y", "--prompt="), USAGE, "--prompt is empty"),
    (("vdx.plan",), USAGE, "--config is missing.*--topology is missing"),
    (("vdx.plan", TINY, "--topology=v5e:2x2", "--most=3"), USAGE, "--most is .* of --search"),
    (("vdx.plan", TINY, "--topology=v5e:2x2", "--clip=big"), USAGE, "--clip=big is not like"),
    (("vdx.plan", TINY, "--topology=v5e:2x2", "--mesh=tensor"), USAGE, "--mesh=tensor is not like"),
    (("vdx.plan", TINY, "--topology=v5e:2x2", "--price=-1"), USAGE, "--price=-1"),
    (("vdx.reference", "docs"), USAGE, "Unknown arguments"),
    (("vdx.data.checksums",), USAGE, "Expected one FOLDER, got none"),
    (("vdx.data.checksums", "a", "b"), USAGE, r"Expected one FOLDER, got \['a', 'b'\]"),
    (("vdx.data.checksums", "a", "--updat"), USAGE, "'updat'. Did you mean: update"),
    # Flags that a manifest overrules
    *(
        (("vdx.sample", RUN, "--from_manifest=x.json", flag), USAGE, f"{name}: a manifest has them")
        for flag, name in [
            (PROMPT, "--prompt"),
            ("--prompts_file=x.txt", "--prompts_file"),
            ("--steps=3", "--steps"),
            ("--seed=0", "--seed"),
            ("--guidance=2", "--guidance"),
            ("--sampler=ddim", "--sampler"),
            ("--step=3", "--step"),
            ("--noaveraged", "--averaged"),
            ("--step_cache", "--step_cache"),
        ]
    ),
    # Config files
    (("vdx.main", "--config=nowhere.py", NEW), 1, "No config file 'nowhere.py'"),
    (("vdx.main", f"--config={ROOT}/configs", NEW), 1, "No config file"),
    (("vdx.main", "--config={at}/empty.txt", NEW), 1, "is not a Python file"),
    (("vdx.main", f"{TINY}:larg", NEW), 1, "t2v_tiny.py, line .*not 'larg'"),
    (("vdx.main", "--config={at}/plain.py:big", NEW), 1, "plain.py has no variants"),
    (("vdx.main", "--config={at}/syntax.py", NEW), 1, "syntax.py, line 1: SyntaxError"),
    (("vdx.main", "--config={at}/name.py", NEW), 1, "name.py, line 5: NameError: .*ConfigDct"),
    (("vdx.main", "--config={at}/import.py", NEW), 1, "import.py, line 2: ModuleNotFoundError"),
    (("vdx.main", "--config={at}/relative.py", NEW), 1, "relative.py, line 1: .*no_such_config"),
    (("vdx.main", "--config={at}/exits.py", NEW), 1, "exits.py, line 2: KeyError: 'seed'"),
    (("vdx.main", "--config={at}/empty.py", NEW), 1, "has no function get_config"),
    (("vdx.main", "--config={at}/returns.py", NEW), 1, "returns dict, expected ConfigDict"),
    (("vdx.main", "--config={at}/values.py", NEW), 1, "config.data.source is function"),
    (("vdx.main", "--config={at}/binary.py", NEW), 1, "binary.py"),
    (("vdx.main", "--config={at}/plain.py", NEW), 1, "config lacks data, model"),
    (("vdx.plan", "--config={at}/name.py", "--topology=v5e:2x2"), 1, "name.py, line 5"),
    # Values of a config
    (("vdx.main", TINY, NEW, "--config.train.steps=ten"), 1, "config.train.steps = 'ten' is str"),
    (("vdx.main", TINY, NEW, "--config.train.steps=1e3"), 1, "config.train.steps = 1000.0 is"),
    (("vdx.main", TINY, NEW, "--config.train.stepz=10"), 1, "Did you mean 'steps'"),
    (("vdx.main", TINY, NEW, "--config.trian.steps=10"), 1, "Did you mean 'train'"),
    (("vdx.main", TINY, NEW, "--config.train=10"), 1, "config.train = 10 is int"),
    (("vdx.main", TINY, NEW, "--config.seed.a=1"), 1, "is a value, not a section"),
    (("vdx.main", TINY, NEW, "--config.mesh={{1, 2}}"), 1, "config.mesh is set"),
    (("vdx.main", TINY, NEW, "--config.mesh={{'data': [}}"), 1, "config.mesh = .* is str"),
    (("vdx.main", TINY, NEW, "--config.mesh.rows=2"), 1, "Unknown key config.mesh.rows"),
    (("vdx.main", TINY, NEW, "--config.sample.sampler=dpm"), 1, "Did you mean 'ddpm'"),
    (("vdx.main", TINY, NEW, "--config.trainable=(["), 1, "config.trainable"),
    (("vdx.main", TINY, NEW, "--config.data.source.name=video"), 1, "unknown name 'video'"),
    (("vdx.main", TINY, NEW, "--config.data.source={at}"), 1, "config.data.source"),
    (("vdx.main", FOLDER, NEW, "--config.data.path={at}/none"), 1, "{at}/none"),
    (("vdx.main", FOLDER, NEW, "--config.data.path={at}/empty"), 1, "{at}/empty"),
    (("vdx.main", FOLDER, NEW, "--config.data.path={at}/file"), 1, "{at}/file"),
    # Places to write
    (("vdx.main", TINY, "--workdir={at}/file"), 1, "exists and is not a folder"),
    (("vdx.main", TINY, "--workdir={at}/file/run"), 1, "file is a file, not a folder"),
    (("vdx.main", TINY, "--workdir=/proc/run"), 1, "--workdir=/proc/run cannot be written"),
    (("vdx.main", TINY, "--workdir={at}/" + "x" * 300), 1, "File name too long"),
    (("vdx.sample", RUN, PROMPT, "--out={at}/clip.mp4"), 1, "exists and is not a file"),
    (("vdx.sample", RUN, PROMPT, "--out={at}/file/a.mp4"), 1, "file is a file, not a folder"),
    (("vdx.sample", RUN, PROMPT, "--out=/proc/a.mp4"), 1, "--out=/proc/a.mp4 cannot be written"),
    (
        ("vdx.sample", RUN, PROMPT, "--out={at}/a.avi"),
        1,
        "in .avi cannot be written; expected .mp4",
    ),
    (("vdx.sample", RUN, PROMPT, "--out={at}/a.json"), 1, "in .json cannot be written"),
    (("vdx.sample", RUN, PROMPT, "--out={at}/file"), 1, "exists and is not a folder"),
    (("vdx.sample", RUN, PROMPT, "--save_array={at}/a.npz"), 1, "--save_array=.*expected .npy"),
    (("vdx.sample", RUN, PROMPT, "--save_array={at}/file/a.npy"), 1, "--save_array=.* is a file"),
    (("vdx.convert", "--source={at}/model", "--out={at}/file"), 1, "exists and is not a folder"),
    (("vdx.convert", "--source={at}/model", "--out={at}/full"), 1, "is not empty. Name a new"),
    (("vdx.export", RUN, "--out={at}/file"), 1, "exists and is not a folder"),
    (("vdx.export", RUN, "--out={at}/full"), 1, "is not empty. Name a new"),
    (("vdx.export", LORA, "--out={at}/a.bin"), 1, "in .bin cannot be written"),
    (("vdx.export", LORA, "--out={at}/file/a.safetensors"), 1, "file is a file, not a folder"),
    (("vdx.plan", TINY, "--topology=v5e:2x2", "--out={at}/a.txt"), 1, "expected .json"),
    (("vdx.plan", TINY, "--topology=v5e:2x2", "--out={at}/file/a.json"), 1, "is a file"),
    (("vdx.reference", "--out={at}/file/a.md"), 1, "is a file"),
    # Runs, weights and files to read
    (("vdx.sample", "--workdir={at}/none", PROMPT), 1, "{at}/none is not a folder"),
    (("vdx.sample", "--workdir={at}/file", PROMPT), 1, "{at}/file is not a folder"),
    (("vdx.sample", "--workdir={at}/empty", PROMPT), 1, "no files. Give the workdir of a run"),
    (("vdx.sample", "--workdir={at}/half_run", PROMPT), 1, "config.json cannot be read as JSON"),
    (("vdx.sample", "--workdir={at}/list_run", PROMPT), 1, "config.json"),
    (("vdx.sample", "--workdir={at}/typo_run", PROMPT), 1, "Did you mean 'model'"),
    (("vdx.sample", "--weights={at}/none", PROMPT), 1, "{at}/none is not a folder"),
    (("vdx.sample", "--weights={at}/run", PROMPT), USAGE, "give it as --workdir"),
    (("vdx.sample", "--weights={at}/model", PROMPT), 1, "model_index.json"),
    (("vdx.sample", "--weights={at}/other", PROMPT), 1, "StableDiffusionPipeline"),
    (("vdx.sample", "--weights={at}/weights.safetensors", PROMPT), 1, "is not a folder"),
    (("vdx.sample", RUN, "--prompts_file={at}/none"), 1, "{at}/none: No such file or directory"),
    (("vdx.sample", RUN, "--prompts_file={at}/empty"), 1, "{at}/empty is a folder; only regular"),
    (("vdx.sample", RUN, "--prompts_file={at}/empty.txt"), USAGE, "has no prompt: expected one a"),
    (("vdx.sample", RUN, "--prompts_file={at}/cp1252.txt"), 1, "cp1252.txt, line 2: .*not UTF-8"),
    (("vdx.evaluate", "--workdir={at}/none"), 1, "not the workdir of a run"),
    (("vdx.evaluate", "--workdir={at}/file"), 1, "{at}/file"),
    (("vdx.evaluate", "--workdir={at}/half_run"), 1, "config.json cannot be read as JSON"),
    (("vdx.evaluate", RUN, "--rows=los"), 1, "Did you mean 'loss'"),
    (("vdx.sample", RUN, PROMPT, "--sampler=dpm"), 1, "Did you mean 'ddpm'"),
    (("vdx.sample", RUN, PROMPT, "--timesteps=wan"), 1, "timesteps"),
    (("vdx.sample", RUN, PROMPT, "--num_frames=7"), 1, "num_frames = 7"),
    (("vdx.sample", RUN, PROMPT, "--image={at}/none.png"), 1, "image"),
    (("vdx.sample", RUN, PROMPT, "--camera={at}/half.json"), 1, "camera"),
    (("vdx.sample", RUN, PROMPT), 1, "{at}/run"),
    (("vdx.sample", RUN, PROMPT, "--step=bset"), 1, "bset"),
    (("vdx.convert", "--source={at}/none", "--out={at}/o"), 1, "{at}/none"),
    (("vdx.convert", "--source={at}/empty", "--out={at}/o"), 1, "{at}/empty"),
    (("vdx.convert", "--source={at}/model", "--out={at}/o"), 1, "model_index.json"),
    (("vdx.convert", "--source={at}/weights.safetensors", "--out={at}/o"), 1, "safetensors"),
    (("vdx.convert", "--source={at}/model", "--out={at}/o", "--vae=x"), 1, "--vae cannot be given"),
    (("vdx.export", "--workdir={at}/none", "--out={at}/o"), 1, "not the workdir of a run"),
    (("vdx.export", RUN, "--out={at}/o"), 1, "Only Wan networks and their adapters"),
    (("vdx.export", LORA, "--out={at}/o.safetensors"), 1, "Only Wan networks and their adapters"),
    (("vdx.export", WAN, "--out={at}/o", "--layout=comfyui"), 1, "Leave --layout away"),
    (("vdx.export", WAN, "--out={at}/o", PROMPT, "--weights=x"), 1, "with adapters alone"),
    (("vdx.export", WAN, "--out={at}/o"), 1, "No checkpoint in {at}/wan_run"),
    (("vdx.plan", TINY, "--topology=v5e"), 1, "v5e"),
    (("vdx.plan", TINY, "--topology=v9:2x2"), 1, "v9"),
    (("vdx.plan", TINY, "--topology=v5e:2x2", "--what=trian"), 1, "Did you mean 'train'"),
    (("vdx.plan", TINY, "--topology=v5e:2x2", "--clip=8,32"), 1, "is not frames, height and width"),
    (("vdx.data.checksums", "{at}/none"), 1, "{at}/none"),
    (("vdx.data.checksums", "{at}/empty"), 1, "neither metadata.jsonl nor videos"),
    (("vdx.data.checksums", "{at}/file"), 1, "{at}/file"),
    # Manifests
    *(
        (("vdx.sample", RUN, f"--from_manifest={{at}}/{name}.json"), 1, message)
        for name, message in [
            ("none", "none.json cannot be read"),
            ("half", "half.json cannot be read as JSON"),
            ("binary", "binary.json"),
            ("list", "list.json is not a manifest of vdx.sample"),
            ("no_request", "no_request.json is not a manifest"),
            ("text_request", "text_request.json is not a manifest"),
            ("no_prompts", "no_prompts.json is not a manifest"),
            ("text_prompts", "text_prompts.json is not a manifest"),
            ("no_weights", "names no weights"),
            ("text_weights", "text_weights.json is not a manifest"),
        ]
    ),
]

# The same where seconds pass before the mistake is found
SLOW = [
    (("vdx.main", TINY, NEW, "--config.mesh.fsdp=3"), 1, "mesh"),
    (("vdx.main", TINY, NEW, "--config.data.loader.global_batch=0"), 1, "global_batch"),
    (("vdx.main", TINY, NEW, "--config.init={at}/none"), 1, "{at}/none"),
    (("vdx.main", TINY, NEW, "--config.resume={at}/empty"), 1, "{at}/empty"),
    (("vdx.main", TINY, NEW, "--config.weights={at}/weights.safetensors"), 1, "safetensors"),
    (("vdx.evaluate", RUN), 1, "No checkpoint in {at}/run"),
    (("vdx.evaluate", RUN, "--step=newest"), 1, "newest"),
    (("vdx.sample", RUN, PROMPT, "--step=7"), 1, "{at}/run"),
    (("vdx.sample", RUN, "--calibrate_cache=0.9"), 1, "{at}/run"),
]


def name(row):
    command, *_ = row
    return " ".join([command[0], *command[-1:]])[:60]


@pytest.mark.parametrize(("command", "code", "message"), MISTAKES, ids=map(name, MISTAKES))
def test_a_mistake_ends_in_a_message(command, code, message, at, capsys):

    ended = run_here(capsys, *(part.format(at=at) for part in command))
    assert "Traceback" not in ended.err, ended.err
    assert ended.code == code, ended.err
    assert re.search(message.format(at=at), ended.err, re.DOTALL), ended.err
    assert len(ended.err.strip().splitlines()) <= 6, ended.err
    assert ("--help` lists the flags" in ended.err) == (code == USAGE)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "code", "message"), SLOW, ids=map(name, SLOW))
def test_a_mistake_that_is_found_later(command, code, message, at, capsys):
    test_a_mistake_ends_in_a_message(command, code, message, at, capsys)


PROGRAMS = [
    "main",
    "sample",
    "evaluate",
    "convert",
    "export",
    "plan",
    "reference",
    "data.checksums",
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_examples_and_the_programs_own_flags(program, capsys):
    ended = run_here(capsys, f"vdx.{program}", "--help")
    assert ended.code == 0 and not ended.err
    assert f"    python -m vdx.{program}" in ended.out and "--helpfull" in ended.out
    assert "--verbosity" not in ended.out and len(ended.out.splitlines()) < 110


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = command("vdx.reference", "--ouf=x", check=False)
    assert done.returncode == USAGE and "'ouf'. Did you mean: out" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3 and not done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_launch_scripts_answer_help(script):
    done = subprocess.run([script, "--help"], text=True, capture_output=True, check=False)
    assert done.returncode == 0 and f"launch/{script.name}" in done.stdout and not done.stderr


@pytest.fixture
def usual_interrupts():
    """SIGINT as in a terminal; a shell starts what is in its background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_while_libraries_are_imported(usual_interrupts):
    with subprocess.Popen(
        [sys.executable, "-m", "vdx.reference", "--out=/proc/x.md"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONVERBOSE": ""},
    ) as process:
        # By now vdx is imported, and its libraries are on the way.
        while (
            process.poll() is None and "numpy" not in Path(f"/proc/{process.pid}/maps").read_text()
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.strip() == "vdx: interrupted."
