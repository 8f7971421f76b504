"""The suite's ground: eight simulated devices, checked shapes, no silent rank promotion.

All of it is set before anything imports jax or vdx.
"""

import fcntl
import os
import tempfile

from tests.xla_flags import COMPILE_FAST, EIGHT_DEVICES

for flag in (COMPILE_FAST, EIGHT_DEVICES):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Each program runs a few times: LLVM's optimizations would double the time of the whole suite.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Programs that several tests or their commands need are compiled once in a session.
COMPILED = tempfile.TemporaryDirectory(prefix="vdx-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

# [b] + [b t] must be written out. Set here and not in the environment: a test's commands run as
# a user runs them.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Every annotation of these two packages is checked at each call, shapes and axis letters too.
jaxtyping.install_import_hook(["vdx.diffusion", "vdx.models"], "beartype.beartype")

from vdx.parallel import MeshSpec  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="session")
def mesh():
    """Of one device."""
    return MeshSpec().make(jax.devices()[:1])


@pytest.fixture(scope="session")
def randomise():
    """randomise(shapes, seed): numpy parameters for a tree of shapes (or of other parameters).

    No layer is at zero, as many are when fresh: it would hide what lies before it. Norms' scales
    stay near one; kernels keep the size of what passes through. Needs no compilation.
    """

    def one(path, leaf, rng):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "scale":
            return 1 + 0.1 * noise
        fan = np.prod(leaf.shape[-2:-1]) if path[-1].key == "kernel" else 25
        return (noise / np.sqrt(fan)).astype(np.float32)

    def all_leaves(shapes, seed=0):
        rng = np.random.default_rng(seed)
        return jax.tree_util.tree_map_with_path(lambda p, leaf: one(p, leaf, rng), shapes)

    return all_leaves


@pytest.fixture(scope="session")
def public_file(tmp_path_factory):
    """public_file(model, seed): every parameter of a transformers model redrawn, saved, and the
    file's {key: array}.

    Embeddings are small, so that the eps of the norm behind them is seen.
    """

    def save(model, seed=0):
        rng = np.random.default_rng(seed)
        for name, leaf in model.named_parameters():
            noise = rng.standard_normal(tuple(leaf.shape))
            if "embed" in name:
                noise = 0.05 * noise
            elif leaf.ndim == 1:
                noise = 0.1 * noise + ("norm" in name and name.endswith("weight"))
            else:
                noise = noise / np.sqrt(np.prod(leaf.shape[1:]))
            leaf.data.copy_(leaf.new_tensor(noise))
        folder = tmp_path_factory.mktemp("public")
        model.eval().save_pretrained(folder)
        return load_file(folder / "model.safetensors")

    return save


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """The workdir of a finished micro run, made by the real command in its own process.

    Tests copy it before they change it.
    """
    from tests.micro_run import MICRO, command

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one run for all workers
        base = base.parent
    path = base / "micro"
    done = base / "micro_done"
    with open(base / "micro_lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            command("vdx.main", "--config=configs/t2v_tiny.py", f"--workdir={path}", *MICRO)
            done.touch()
    return path


@pytest.fixture
def at_root(monkeypatch):
    """Runs a test in the repository's root, where `configs/` is found."""
    monkeypatch.chdir(ROOT)
