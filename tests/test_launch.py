"""The scripts in launch/, with stubs in the place of the programs that would leave this machine."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="module", autouse=True)
def signals():
    """Bash cannot trap what was ignored when it began, as SIGINT and SIGHUP are under nohup."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP)}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
CONFIG = "configs/t2v_tiny.py"
OVERRIDES = [
    "--config.train.sample_prompts=('a red circle', 'b')",
    '--config.note="$HOME" $(id) it\'s',
]
MAIN = ["-m", "vdx.main", f"--config={CONFIG}"]


class Stubs:
    """Programs that write down how they were called, before all others on PATH.

    Those that could reach a network are always among them, and fail unless a test gives them a
    body: Python, in which `args` are the arguments and `here` is the folder of the test.
    """

    def __init__(self, here: Path):
        self.here, self.bin, self.root = here, here / "bin", ROOT
        self.bin.mkdir()
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {
            "PATH": f"{self.bin}:{os.environ['PATH']}"
        }
        for name in ("gcloud", "kubectl", "srun", "scontrol", "sbatch", "ssh", "docker"):
            self.add(name, "sys.exit(99)")
        self.add("sleep")

    def add(self, name: str, body: str = "") -> None:
        # Only what the body needs: stubs are called hundreds of times.
        modules = [name for name in ("shutil", "subprocess", "time") if f"{name}." in body]
        folder = f"pathlib.Path({str(self.here)!r})" if "here" in body or "next_of" in body else ""
        modules += ["pathlib"] if folder else []
        (self.bin / name).write_text(f"""#!{sys.executable} -SE
import {", ".join(["json", "os", "signal", "sys", *modules])}
here, args = {folder or None}, sys.argv[1:]

def next_of(name):      # the next word of a file
    words = (here / name).read_text().split()
    (here / name).write_text(" ".join(words[1:]))
    return words[0]

def end(code):          # as a shell would see it
    if code > 128:
        os.kill(os.getpid(), code - 128)
    sys.exit(code)

with open({str(self.here / "calls")!r}, "a") as file:
    file.write(json.dumps([{name!r}, *args]) + "\\n")
{body}
""")
        (self.bin / name).chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        file = self.here / "calls"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [row[1:] for row in rows if row[0] == name]

    def write(self, name: str, text: str) -> None:
        (self.here / name).write_text(text)

    def start(self, script: str, *args: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.root / "launch" / script, *args],
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.here,
            start_new_session=True,
        )

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        child = self.start(script, *args, **env)
        out, err = child.communicate(timeout=30)
        return subprocess.CompletedProcess(args, child.returncode, out, err)


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    assert f"`{script.name}`" in (ROOT / "launch" / "README.md").read_text()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_content(script):
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# again.sh


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "pauses"),
    [
        ("0", 20, 0, ""),
        ("1 0", 20, 1, ""),
        ("2 0", 20, 2, ""),
        ("42 75 137 134 0", 20, 0, "1 2 4 8"),
        ("75 1 0", 20, 1, "1"),
        ("42 75 42 0", 2, 42, "1 2"),
        ("75 75 137 0", 2, 75, "1 2"),
        ("139 0", 0, 75, ""),
        (8 * "75 " + "0", 20, 0, "1 2 4 8 16 32 60 60"),
    ],
)
def test_again(stubs, codes, restarts, code, pauses):
    stubs.write("codes", codes)
    stubs.add("trainer", "end(int(next_of('codes')))")
    done = stubs.run("again.sh", "trainer", "a b", "'", RESTARTS=str(restarts))
    assert done.returncode == code, done.stderr
    assert [call[0] for call in stubs.calls("sleep")] == pauses.split()
    assert stubs.calls("trainer") == [["a b", "'"]] * (len(pauses.split()) + 1)
    assert done.stderr.count("starting again") == len(pauses.split())


@pytest.mark.parametrize(("seconds", "pauses"), [(59, "1 2 4"), (60, "1 1 1")])
def test_after_a_minute_the_pause_is_short_again(stubs, seconds, pauses):
    stubs.write("codes", "75 75 75 0")
    stubs.write("clock", "0")
    stubs.add("trainer", "end(int(next_of('codes')))")
    stubs.add(
        "date",
        f"""
now = int((here / "clock").read_text())
(here / "clock").write_text(str(now + {seconds}))
print(now)""",
    )
    # `date` is asked before and after each run, so that every run takes `seconds`.
    assert stubs.run("again.sh", "trainer").returncode == 0
    assert [call[0] for call in stubs.calls("sleep")] == pauses.split()


HEARS = """
heard = []
def hear(number, frame):
    heard.append(signal.Signals(number).name)
    (here / "heard").write_text(" ".join(heard))
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, hear)
(here / "ready").touch()
while len(heard) < LIMIT:
    time.sleep(0.01)
time.sleep(0.3)
end(CODE)
"""


@pytest.mark.parametrize(
    ("sent", "heard", "code"),
    [
        ("SIGTERM", "SIGTERM", 42),
        ("SIGINT", "SIGINT", 42),
        ("SIGHUP", "SIGTERM", 42),
        ("SIGTERM SIGTERM", "SIGTERM SIGTERM", 42),
        ("SIGTERM", "SIGTERM", 0),
        ("SIGTERM", "SIGTERM", 137),
    ],
)
def test_a_signal_goes_on_to_the_command(stubs, sent, heard, code):
    sent = sent.split()
    stubs.add("trainer", HEARS.replace("LIMIT", str(len(sent))).replace("CODE", str(code)))
    child = stubs.start("again.sh", "trainer")
    until((stubs.here / "ready").exists)
    for i, name in enumerate(sent):
        # To the whole group, as a terminal does: the command must not hear it twice.
        os.killpg(child.pid, signal.Signals[name])
        until(
            lambda n=i: (
                len((stubs.here / "heard").read_text().split()) > n
                if (stubs.here / "heard").exists()
                else False
            )
        )
    err = child.communicate(timeout=10)[1]
    assert child.returncode == (75 if code > 128 else code), err
    assert (stubs.here / "heard").read_text() == heard
    assert len(stubs.calls("trainer")) == 1 and "starting again" not in err


def test_a_signal_in_the_pause(stubs):
    stubs.write("codes", "42 0")
    stubs.add("trainer", "end(int(next_of('codes')))")
    stubs.add("sleep", "time.sleep(60 if args == ['1'] else 0)")
    child = stubs.start("again.sh", "trainer")
    until(lambda: stubs.calls("sleep"))
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=10)
    assert child.returncode == 42 and len(stubs.calls("trainer")) == 1


def test_a_suspended_command_has_not_ended(stubs):
    stubs.add(
        "trainer",
        "(here / 'pid').write_text(str(os.getpid()))\nos.kill(os.getpid(), signal.SIGSTOP)\nend(3)",
    )
    child = stubs.start("again.sh", "trainer")
    until(lambda: len(stubs.calls("sleep")) > 2)  # it looks again and again
    assert child.poll() is None and len(stubs.calls("trainer")) == 1
    os.kill(int((stubs.here / "pid").read_text()), signal.SIGCONT)
    child.communicate(timeout=10)
    assert child.returncode == 3 and len(stubs.calls("trainer")) == 1


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_processes_that_start_again_one_by_one_find_each_other(stubs, victim, tmp_path):
    """JAX's own rendezvous, each process under an again.sh of its own, as on a TPU slice."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (stubs.bin / "sleep").unlink()
    stubs.write(
        "member.py",
        f"""
import os, pathlib, sys, time
import jax
index = int(sys.argv[1])
mark = pathlib.Path({str(tmp_path)!r}) / f"life{{index}}"
first = not mark.exists()
mark.touch()
jax.distributed.initialize("127.0.0.1:{port}", 2, index, heartbeat_timeout_seconds=10)
if first:
    time.sleep(1)
    if index == {victim}:
        os._exit(75)
    time.sleep(100)
jax.distributed.shutdown()
""",
    )
    children = [
        stubs.start("again.sh", sys.executable, str(tmp_path / "member.py"), str(i))
        for i in range(2)
    ]
    for child in children:
        err = child.communicate(timeout=100)[1]
        assert child.returncode == 0 and err.count("starting again") == 1, err


# One machine


def test_laptop_and_gpu_host(stubs):
    stubs.add(
        "python3",
        "(here / 'platforms').write_text(os.environ.get('JAX_PLATFORMS', ''))\n"
        "end(int(next_of('codes')))",
    )
    stubs.add("nvidia-smi", "end(int(next_of('gpu')))")
    for script in ("laptop.sh", "gpu_host.sh"):
        stubs.write("codes", "75 0")
        stubs.write("gpu", "0")
        (stubs.here / "calls").unlink(missing_ok=True)
        assert stubs.run(script, CONFIG, "runs/a b", *OVERRIDES).returncode == 0
        assert stubs.calls("python3") == [[*MAIN, "--workdir=runs/a b", *OVERRIDES]] * 2
    assert (stubs.here / "platforms").read_text() == "cuda,cpu"
    stubs.write("gpu", "9")
    done = stubs.run("gpu_host.sh", CONFIG, "runs/a")
    assert done.returncode == 1 and "no GPU" in done.stderr and len(stubs.calls("python3")) == 2
    stubs.write("codes", "0")
    stubs.run("laptop.sh")
    assert stubs.calls("python3")[-1] == [*MAIN, "--workdir=runs/t2v_tiny"]


LOCAL = """
if args[0] == "-c":
    print(4321)
    sys.exit()
index = [a.partition("=")[2] for a in args if a.startswith("--process_id=")][0]
seconds, code = next_of("life" + index).split(":")
signal.signal(signal.SIGTERM, lambda *_: end(42))
(here / ("ready" + index)).touch()
time.sleep(float(seconds))
end(int(code))
"""


@pytest.mark.parametrize(
    ("first", "second", "code", "lives"),
    [
        ("0:137 0:0", "0.4:75 0:0", 0, 2),  # killed, and its peer loses touch
        ("0.4:75 0:0", "0:42 0:0", 0, 2),
        ("0.4:75 0:0", "0:1 0:0", 1, 1),  # the first that fails says why
        ("0:0", "0:0", 0, 1),
    ],
)
def test_local_starts_all_again(stubs, first, second, code, lives):
    stubs.add("python3", LOCAL)
    stubs.write("life0", first)
    stubs.write("life1", second)
    done = stubs.run("local.sh", "--processes=2", CONFIG, "runs/a b", *OVERRIDES)
    assert done.returncode == code, done.stderr
    calls = [call for call in stubs.calls("python3") if call[0] == "-m"]
    assert len(calls) == 2 * lives
    for index in range(2):
        assert [
            *MAIN,
            "--workdir=runs/a b",
            "--coordinator=127.0.0.1:4321",
            "--num_processes=2",
            f"--process_id={index}",
            *OVERRIDES,
        ] in calls


def test_local_stops_all(stubs):
    stubs.add("python3", LOCAL)
    for index in range(2):
        stubs.write(f"life{index}", "60:0 60:0")
    child = stubs.start("local.sh", "--processes=2", CONFIG, "runs/a")
    until(lambda: all((stubs.here / f"ready{i}").exists() for i in range(2)))
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=10)
    assert child.returncode == 42
    assert len([call for call in stubs.calls("python3") if call[0] == "-m"]) == 2


# TPU slices

GCLOUD = """
assert args[:2] == ["compute", "tpus"], args
options = dict(a.partition("=")[::2] for a in args[4:])
workers = [here / f"worker{i}" for i in range(2)]
if args[2:4] == ["queued-resources", "describe"]:
    if options["--format"] == "yaml(state)":
        print("no quota for this")
        sys.exit()
    state = next_of("states")
    if state == "NONE":
        sys.exit(1)
    print(state)
elif args[2:4] == ["queued-resources", "create"]:
    sys.exit(int((here / "create").read_text()))
elif args[2:4] == ["tpu-vm", "scp"]:
    assert options["--worker"] == "all" and args[5] == "slice:vdx.tar"
    for worker in workers:
        worker.mkdir(exist_ok=True)
        shutil.copy(args[4], worker / "vdx.tar")
elif args[2:4] == ["tpu-vm", "ssh"]:
    assert options["--worker"] == "all" and args[4] == "slice"
    shells = [subprocess.Popen(["bash", "-c", options["--command"]], cwd=worker,
                               env=os.environ | {"HOME": str(worker), "TMPDIR": str(worker)})
              for worker in workers]
    sys.exit(max([shell.wait() for shell in shells]))
"""
HOST = """
home = pathlib.Path(os.environ["HOME"])
if args[1] != "vdx.main":
    sys.exit()
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), end(42)))
(home / "started").touch()
print("trains", os.environ["JAX_PLATFORMS"], flush=True)
code = next_of(home.name + ".codes")
if code == "wait":
    time.sleep(60)
    code = 1
end(int(code))
"""
POD = {"TPU": "slice", "ZONE": "z", "ACCELERATOR": "v5litepod-8", "VERSION": "image"}


@pytest.fixture
def pod(stubs):
    """A slice of two hosts, and a repository whose last commit has the scripts as they are."""
    stubs.root = stubs.here / "repository"
    shutil.copytree(ROOT / "launch", stubs.root / "launch")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "all"],
    ):
        subprocess.run(["git", *command], cwd=stubs.root, check=True)
    stubs.add("gcloud", GCLOUD)
    stubs.add("python3", HOST)
    stubs.write("create", "0")
    return stubs


def lives(pod, *codes):
    """What vdx.main ends with on the workers, one life after the other."""
    for i, words in enumerate(codes):
        pod.write(f"worker{i}.codes", words)


def requests(pod) -> list[str]:
    return [
        call[3]
        for call in pod.calls("gcloud")
        if call[2] == "queued-resources" and call[3] != "describe"
    ]


def trainings(pod) -> list[list[str]]:
    return [call for call in pod.calls("python3") if call[1] == "vdx.main"]


def test_tpu_slice_from_the_queue(pod):
    pod.write("states", "NONE WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    lives(pod, "75 0", "134 0")
    done = pod.run("tpu_pod.sh", CONFIG, "/mnt/a b", *OVERRIDES, **POD, SPOT="1")
    assert done.returncode == 0, done.stderr
    assert [call for call in pod.calls("gcloud") if call[3] == "create"] == [
        [
            "compute",
            "tpus",
            "queued-resources",
            "create",
            "slice",
            "--zone=z",
            "--node-id=slice",
            "--accelerator-type=v5litepod-8",
            "--spot",
            "--runtime-version=image",
        ]
    ]
    assert done.stderr.count("is WAITING_FOR_RESOURCES") == 1
    # Two hosts, each of which started twice, with every quote where it was.
    assert trainings(pod) == [[*MAIN, "--workdir=/mnt/a b", "--distributed", *OVERRIDES]] * 4
    assert done.stdout.count("trains tpu,cpu") == 4
    assert "not committed" not in done.stderr


def test_tpu_slice_that_is_there(pod):
    lives(pod, "1", "1")
    (pod.root / "new.py").touch()
    done = pod.run("tpu_pod.sh", CONFIG, "/mnt/a", TPU="slice", ZONE="z")
    assert done.returncode == 1 and len(trainings(pod)) == 2
    assert not [call for call in pod.calls("gcloud") if call[2] == "queued-resources"]
    assert "not committed" in done.stderr and not (pod.here / "worker1/vdx/new.py").exists()


@pytest.mark.parametrize(
    ("states", "create", "code", "asked", "message"),
    [
        ("SUSPENDING SUSPENDED NONE ACTIVE", 0, 0, ["delete", "create"], "was taken back"),
        ("ACTIVE", 0, 0, [], ""),
        ("NONE ACCEPTED FAILED", 0, 1, ["create"], "no quota for this"),
        ("NONE ACTIVE", 3, 3, ["create"], "not there yet"),
    ],
)
def test_tpu_requests(pod, states, create, code, asked, message):
    pod.write("states", states)
    pod.write("create", str(create))
    lives(pod, "0", "0")
    done = pod.run("tpu_pod.sh", CONFIG, "/mnt/a", **POD)
    assert done.returncode == code and message in done.stderr, done.stderr
    assert requests(pod) == asked
    assert len(trainings(pod)) == (2 if code == 0 else 0)


def test_tpu_hosts_outlive_the_command_and_a_second_one_takes_over(pod):
    pod.write("states", "ACTIVE ACTIVE")
    lives(pod, "wait 0", "wait 0")
    child = pod.start("tpu_pod.sh", CONFIG, "/mnt/a", **POD)
    until(lambda: all((pod.here / f"worker{i}/started").exists() for i in range(2)))
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate(timeout=10)
    logs = [next((pod.here / f"worker{i}").glob("vdx-*")) / "log" for i in range(2)]
    assert [log.read_text() for log in logs] == ["trains tpu,cpu\n"] * 2
    done = pod.run("tpu_pod.sh", CONFIG, "/mnt/a", **POD)
    assert done.returncode == 0, done.stderr
    assert [log.read_text() for log in logs] == ["trains tpu,cpu\nsaved\ntrains tpu,cpu\n"] * 2


def test_detached_follows_what_runs_and_knows_what_was_killed(stubs):
    stubs.add("trainer", "print('trains', flush=True)\ntime.sleep(60)")
    env = {"TMPDIR": str(stubs.here)}
    children = [stubs.start("detached.sh", "trainer", **env)]
    until(lambda: stubs.calls("trainer"))
    children.append(stubs.start("detached.sh", "trainer", **env))  # as gcloud does, to retry
    assert [child.stdout.readline() for child in children] == ["trains\n"] * 2
    os.killpg(int(next(stubs.here.glob("vdx-*/pid")).read_text()), signal.SIGKILL)
    for child in children:
        child.communicate(timeout=10)
        assert child.returncode == 75
    assert len(stubs.calls("trainer")) == 1
    assert stubs.run("detached.sh", **env).returncode == 0  # nothing to stop


def test_detached_waits_until_what_it_stops_has_saved(stubs):
    stubs.add(
        "trainer", HEARS.replace("LIMIT", "1").replace("CODE", "[(here / 'saved').touch(), 42][1]")
    )
    env = {"TMPDIR": str(stubs.here)}
    child = stubs.start("detached.sh", "trainer", **env)
    until((stubs.here / "ready").exists)
    assert stubs.run("detached.sh", **env).returncode == 0
    assert (stubs.here / "saved").exists()
    child.communicate(timeout=10)
    assert child.returncode == 42


# Slurm

SBATCH = """
script = here / "spool" / "slurm_script"       # Slurm runs a copy, far from the repository
script.parent.mkdir(exist_ok=True)
shutil.copy(args[0], script)
os.execvpe("bash", ["bash", str(script), *args[1:]], os.environ | {
    "SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"})
"""


def submit(stubs, **env):
    stubs.add("sbatch", SBATCH.replace("ROOT", repr(str(ROOT))))
    stubs.add("scontrol")
    return subprocess.Popen(
        ["sbatch", ROOT / "launch/slurm.sh", CONFIG, "runs/a b", *OVERRIDES],
        env=stubs.env | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("ends", "count", "code", "requeued"),
    [
        (0, 0, 0, False),
        (1, 0, 1, False),
        (42, 0, 42, True),
        (75, 19, 75, True),
        (137, 0, 75, True),
        (134, 0, 75, True),
        (75, 20, 75, False),
    ],
)
def test_slurm(stubs, ends, count, code, requeued):
    stubs.add("srun", f"(here / 'cores').write_text(os.environ['SRUN_CPUS_PER_TASK'])\nend({ends})")
    child = submit(stubs, SLURM_RESTART_COUNT=str(count))
    err = child.communicate(timeout=10)[1]
    assert child.returncode == code, err
    assert stubs.calls("srun") == [
        [
            "--kill-on-bad-exit=0",
            "python3",
            *MAIN,
            "--workdir=runs/a b",
            "--distributed",
            *OVERRIDES,
        ]
    ]
    assert stubs.calls("scontrol") == [["requeue", "7"]] * requeued
    assert (stubs.here / "cores").read_text() == "8"


def test_a_cancelled_slurm_job_is_not_requeued(stubs):
    stubs.add("srun", HEARS.replace("LIMIT", "1").replace("CODE", "42"))
    child = submit(stubs)
    until((stubs.here / "ready").exists)
    os.killpg(child.pid, signal.SIGTERM)  # to all of the job's processes
    child.communicate(timeout=10)
    assert child.returncode == -signal.SIGTERM
    assert (stubs.here / "heard").read_text() == "SIGTERM" and not stubs.calls("scontrol")


def test_slurm_asks_for_what_jax_needs():
    lines = (ROOT / "launch/slurm.sh").read_text().splitlines()
    head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    # sbatch stops at a command
    assert not any(line.startswith("#SBATCH") for line in lines[len(head) :])
    options = {line.removeprefix("#SBATCH --") for line in head if line.startswith("#SBATCH")}
    assert {"signal=TERM@120", "requeue", "open-mode=append"} <= options
    values = dict(option.partition("=")[::2] for option in options)
    assert values["gpus-per-node"] == values["ntasks-per-node"] and "gpus-per-task" not in values


# GKE

GKE = {"IMAGE": "eu/x:1", "CLAIM": "disk", "ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "4x8"}


def action(rules: list[dict], code: int) -> str:
    """What Kubernetes does with a pod whose container ended with `code`: the first rule that fits,
    else it counts as a failure."""
    for rule in rules:
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]
            assert codes["containerName"] == "vdx"
            if (code in codes["values"]) == (codes["operator"] == "In"):
                return rule["action"]
    return "Count"


def test_gke_job(stubs):
    done = stubs.run("gke.sh", "--dry-run", CONFIG, "/mnt/shared/runs/Base_1", *OVERRIDES, **GKE)
    assert done.returncode == 0, done.stderr
    service, job = yaml.safe_load_all(done.stdout)
    assert not stubs.calls("kubectl")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    name = job["metadata"]["name"]
    assert name == "vdx-base-1" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 8
    rules = spec["podFailurePolicy"]["rules"]
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy needs
    assert {code: action(rules, code) for code in (1, 2, 42, 75, 137)} == {
        1: "FailJob",
        2: "FailJob",
        42: "Ignore",
        75: "Ignore",
        137: "Count",
    }
    assert rules[0] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    [container] = pod["containers"]
    assert [a.replace("$$(", "$(") for a in container["command"]] == [
        "launch/again.sh",
        "python3",
        *MAIN,
        "--workdir=/mnt/shared/runs/Base_1",
        "--distributed",
        *OVERRIDES,
    ]
    assert not any("$(" in a.replace("$$(", "") for a in container["command"])
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["resources"]["requests"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert container["image"] == "eu/x:1"
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "disk"}} in pod["volumes"]


def test_gke_starts_anew(stubs):
    stubs.add("kubectl", "if args[0] == 'apply': (here / 'applied').write_text(sys.stdin.read())")
    arguments = CONFIG, "/mnt/shared/base"
    assert stubs.run("gke.sh", *arguments, **GKE).returncode == 0
    assert stubs.calls("kubectl") == [
        ["delete", "job", "vdx-base", "--ignore-not-found", "--cascade=foreground"],
        ["apply", "-f", "-"],
    ]
    printed = stubs.run("gke.sh", "--dry-run", *arguments, **GKE).stdout
    assert (stubs.here / "applied").read_text() == printed


@pytest.mark.parametrize(
    ("change", "message"),
    [({"TOPOLOGY": "3x1"}, "3 chips are not nodes of 4"), ({"IMAGE": ""}, "IMAGE: a container")],
)
def test_gke_says_what_is_missing(stubs, change, message):
    done = stubs.run("gke.sh", CONFIG, "/mnt/shared/base", **GKE | change)
    assert done.returncode != 0 and message in done.stderr and not stubs.calls("kubectl")
