"""Samplers against closed forms: Gaussian data has a known denoiser and a known ODE map.

For data N(m, S), E[x0 | x_t] = m + alpha S / (alpha^2 S + sigma^2) (x_t - alpha m), and the
probability flow ODE keeps (x_t - alpha m) / sqrt(alpha^2 S + sigma^2) constant. Both are
written here in float64, apart from the code under test. The second half compares every state
of a trajectory with diffusers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.diffusion import samplers
from vdx.diffusion.process import PREDICTIONS, PROCESSES, RectifiedFlow, VariancePreserving, expand
from vdx.diffusion.samplers import DDIM, SAMPLERS, fresh_noise, sample
from vdx.diffusion.timesteps import TIMESTEPS, uniform_timesteps
from vdx.parallel import MeshSpec, batch_sharding

MEAN = np.array([0.8, -0.5, 0.1, 0.0, -1.2])
VARIANCE = np.array([0.04, 0.5, 1.0, 0.001, 2.0])
ODE = [name for name in SAMPLERS if name != "ddpm"]
ORDER = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "unipc": 3}  # UniPC's corrector adds 1
ODE_CASES = [
    (name, row, list(PREDICTIONS)[(i + j) % len(PREDICTIONS)])
    for i, name in enumerate(PROCESSES)
    for j, row in enumerate(ODE)
]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def quick(names, few):
    """The names as cases, those that are not of a few as slow ones."""
    return [n if n in few else slow(n) for n in names]


def oracle(process):
    """The exact denoiser of N(MEAN, VARIANCE), in the space that the process predicts."""

    def denoise(x, t):
        a, s = expand(process.alpha(t), x), expand(process.sigma(t), x)
        mean, variance = (v.reshape(1, 1, 1, 1, -1) for v in (MEAN, VARIANCE))
        total = a**2 * variance + s**2
        x0 = mean + a * variance / total * (x - a * mean)
        # s / total, so that the noise is exact also where s is small.
        return process.from_x0_noise(x0, s / total * (x - a * mean), t)

    return denoise


def exact_map(process, x, start, end):
    a, s = process.alpha(np.array([start, end])), process.sigma(np.array([start, end]))
    spread = np.sqrt(a[:, None] ** 2 * VARIANCE + s[:, None] ** 2)
    return a[1] * MEAN + spread[1] / spread[0] * (np.asarray(x, np.float64) - a[0] * MEAN)


def at_start(process, start, b):
    """b draws of x at time `start`, [b 1 1 1 d]."""
    z = np.random.default_rng(0).normal(size=(b, 1, 1, 1, len(MEAN)))
    a, s = process.alpha(start), process.sigma(start)
    return jnp.asarray(a * MEAN + np.sqrt(a**2 * VARIANCE + s**2) * z, jnp.float32)


def run(process, sampler, x, times, denoise=None, key=None):
    keys = None if key is None else jax.random.split(key, len(x))
    go = jax.jit(lambda x: sample(denoise or oracle(process), process, sampler, x, times, keys))
    return np.asarray(go(x))


@pytest.mark.parametrize("name", quick(PROCESSES, ["variance_preserving"]))
@pytest.mark.parametrize("row", ODE)
def test_error_falls_with_the_stated_order(name, row):
    process = PROCESSES[name](prediction="v")
    x = at_start(process, 0.9, 16)
    errors = []
    for n in (16, 32):
        times = np.linspace(0.9, 0.2, n + 1)
        got = run(process, SAMPLERS[row](), x, times)
        errors.append(np.abs(got - exact_map(process, x, 0.9, 0.2)).mean())
    slope = np.log2(errors[0] / errors[1])
    assert abs(slope - ORDER[row]) < 0.4, (errors, slope)


def test_unipc_without_corrector_is_dpmpp_2m():
    """The predictors coincide, and that of order 1 is DDIM."""
    process = RectifiedFlow()
    x, times = at_start(process, 1.0, 4), uniform_timesteps(process, 5, shift=2.0)
    by = lambda sampler: run(process, sampler, x, times)
    np.testing.assert_allclose(
        by(SAMPLERS["unipc"](corrector=False)), by(SAMPLERS["dpmpp_2m"]()), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        by(SAMPLERS["unipc"](order=1, corrector=False)),
        by(SAMPLERS["ddim"]()),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "name,row,kind",
    ODE_CASES
    + [
        slow(name, "dpmpp_2m", kind)
        for name in PROCESSES
        for kind in PREDICTIONS
        if (name, "dpmpp_2m", kind) not in ODE_CASES
    ],
)
def test_ode_samplers_reach_the_data(name, row, kind):
    """From t = 1 to t = 0: the exact map of every point, so its mean and covariance."""
    process = PROCESSES[name](prediction=kind)
    times = uniform_timesteps(process, 40, shift=1.0)
    x = at_start(process, times[0], 16)
    got = run(process, SAMPLERS[row](), x, times)
    want = exact_map(process, x, times[0], 0.0)
    np.testing.assert_allclose(got, want, atol=0.2 if ORDER[row] == 1 else 0.05)


def ancestral_moments(process, times):
    """Mean and variance [d] that ancestral sampling with the exact denoiser has, in float64."""
    alpha, sigma = process.alpha(times), process.sigma(times)
    mean, var = alpha[0] * MEAN, alpha[0] ** 2 * VARIANCE + sigma[0] ** 2
    for at, a, st, s in zip(alpha[:-1], alpha[1:], sigma[:-1], sigma[1:], strict=True):
        rest = 1 - (at / a * s / st) ** 2  # part of q(x_s | x_t, x0) that comes from x0
        slope = at * VARIANCE / (at**2 * VARIANCE + st**2)
        of_x0, of_x = a * rest, at / a * (s / st) ** 2
        mean = of_x0 * (MEAN + slope * (mean - at * MEAN)) + of_x * mean
        var = (of_x0 * slope + of_x) ** 2 * var + s**2 * rest
    return mean, var


@pytest.mark.parametrize("name", PROCESSES)
def test_ancestral_sampling_has_the_right_distribution(name):
    """The moments of a finite number of steps; these go to those of the data."""
    process = PROCESSES[name]()
    n, times = 8000, uniform_timesteps(process, 50)
    x = at_start(process, 1.0, n)
    got = run(process, SAMPLERS["ddpm"](), x, times, key=jax.random.key(1)).reshape(n, -1)
    mean, var = ancestral_moments(process, times)
    covariance = np.cov(got.T)
    assert np.all(np.abs(got.mean(0) - mean) < 5 * (var / n) ** 0.5)
    np.testing.assert_allclose(np.diag(covariance), var, rtol=5 * (2 / n) ** 0.5)
    correlation = np.corrcoef(got.T) - np.eye(len(MEAN))
    assert np.abs(correlation).max() < 5 / n**0.5
    mean, var = ancestral_moments(process, np.linspace(1, 0, 50001))
    np.testing.assert_allclose(mean, MEAN, atol=1e-4)
    np.testing.assert_allclose(var, VARIANCE, rtol=0.02)


@pytest.mark.parametrize("name", PROCESSES)
def test_ancestral_step_is_the_posterior(name):
    """One step with a known x0 has the mean and variance of q(x_s | x_t, x0) (Bayes' rule)."""
    process = PROCESSES[name](prediction="x0")
    n, x_t, x0, t, s = 40000, 0.7, -0.4, 0.6, 0.35
    x = jnp.full((n, 1, 1, 1, 1), x_t)
    got = run(
        process,
        SAMPLERS["ddpm"](),
        x,
        np.array([t, s]),
        lambda x, t: jnp.full_like(x, x0),
        jax.random.key(0),
    )
    (at, as_), (st, ss) = (f(np.array([t, s])) for f in (process.alpha, process.sigma))
    # Prior x_s ~ N(as x0, ss^2); likelihood x_t ~ N(at / as x_s, st^2 - (at / as)^2 ss^2).
    ratio = at / as_
    precision = 1 / ss**2 + ratio**2 / (st**2 - ratio**2 * ss**2)
    mean = (as_ * x0 / ss**2 + ratio * x_t / (st**2 - ratio**2 * ss**2)) / precision
    np.testing.assert_allclose(got.mean(), mean, atol=5 * (1 / precision / n) ** 0.5)
    np.testing.assert_allclose(got.var(), 1 / precision, rtol=5 * (2 / n) ** 0.5)


@pytest.mark.parametrize("name", quick(PROCESSES, ["rectified_flow"]))
@pytest.mark.parametrize("row", SAMPLERS)
def test_the_network_is_traced_once(name, row):
    process = PROCESSES[name]()
    calls = []

    def denoise(x, t):
        calls.append(t.shape)
        assert x.dtype == t.dtype == jnp.float32
        return oracle(process)(x, t).astype(jnp.bfloat16)

    times = uniform_timesteps(process, 6)
    go = jax.jit(lambda x, keys: sample(denoise, process, SAMPLERS[row](), x, times, keys))
    x = at_start(process, 1.0, 2).astype(jnp.bfloat16)
    out = go(x, jax.random.split(jax.random.key(0)))
    again = go(x, jax.random.split(jax.random.key(1)))
    assert calls == [(2,)]
    assert out.dtype == jnp.float32 and np.all(np.isfinite(out))
    assert np.array_equal(out, again) == (row != "ddpm")


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("row", SAMPLERS)
@pytest.mark.parametrize("steps", quick([1, 3], [3]))
def test_few_steps_are_exact_for_one_video(name, row, steps):
    """Data that is one point has a straight ODE: any number of steps ends on the point."""
    process = PROCESSES[name]()
    point = jnp.asarray(MEAN, jnp.float32).reshape(1, 1, 1, 1, -1)

    def denoise(x, t):
        a, s = expand(process.alpha(t), x), expand(process.sigma(t), x)
        return process.from_x0_noise(jnp.broadcast_to(point, x.shape), (x - a * point) / s, t)

    x = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, len(MEAN)))
    got = run(
        process, SAMPLERS[row](), x, uniform_timesteps(process, steps), denoise, jax.random.key(1)
    )
    np.testing.assert_allclose(got, jnp.broadcast_to(point, x.shape), atol=1e-4)


# Two that draw noise, and one that keeps more than the clip.
ROWS = [SAMPLERS["ddpm"](), DDIM(eta=0.6), SAMPLERS["unipc"]()]
ROWS += [slow(SAMPLERS[name]()) for name in SAMPLERS if name not in ("ddpm", "unipc")]


@pytest.mark.parametrize("sampler", ROWS, ids=str)
def test_a_clip_is_the_same_alone_in_any_batch_and_on_any_mesh(sampler):
    process = RectifiedFlow()
    times = uniform_timesteps(process, 5)
    # A clip of 128 numbers and one product: no shape makes XLA round in another order.
    x = np.random.default_rng(0).normal(size=(8, 4, 4, 2, 4)).astype(np.float32)
    seeds = np.arange(20, 28)

    @jax.jit
    def draw(x, seeds):
        keys = jax.vmap(jax.random.key)(seeds)
        return sample(lambda x, t: expand(t, x) * x, process, sampler, x, times, keys)

    whole = np.asarray(draw(x, seeds))
    assert np.unique(whole, axis=0).shape == whole.shape
    for rows in ([0], [5], [3, 3, 6, 0, 1]):
        np.testing.assert_array_equal(draw(x[rows], seeds[rows]), whole[rows])
    mesh = MeshSpec(data=2, fsdp=2, tensor=2).make(jax.devices())
    placed = jax.device_put((x, seeds), batch_sharding(mesh))
    np.testing.assert_array_equal(draw(*placed), whole)


def test_fresh_noise_is_that_of_the_clips_key():
    """The bits of a clip drawn alone by a stochastic sampler are those that they always were."""
    keys = jax.vmap(jax.random.key)(np.arange(3))
    found = fresh_noise(keys, jnp.int32(4), (2, 3))
    for seed in range(3):
        key = jax.random.fold_in(jax.random.key(seed), 4)
        np.testing.assert_array_equal(found[seed], jax.random.normal(key, (1, 2, 3))[0])


def test_grid():
    vp, flow = VariancePreserving(), RectifiedFlow()
    np.testing.assert_allclose(uniform_timesteps(flow, 4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(uniform_timesteps(flow, 2, shift=3.0), [1, 0.75, 0])
    assert uniform_timesteps(RectifiedFlow(prediction="noise"), 4)[0] == 0.999
    np.testing.assert_allclose(uniform_timesteps(vp, 3) * 1000, [1000, 667, 333, 0])
    with pytest.raises(ConfigError, match="fewer steps"):
        uniform_timesteps(vp, 1001)
    with pytest.raises(ConfigError, match="positive"):
        uniform_timesteps(flow, 0)


def test_errors():
    process = RectifiedFlow()
    x = jnp.zeros((1, 1, 1, 1, 2))
    denoise = lambda x, t: x
    with pytest.raises(ValueError, match="decreasing"):
        sample(denoise, process, SAMPLERS["euler"](), x, np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="key"):
        sample(denoise, process, SAMPLERS["ddpm"](), x, np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="uniform_timesteps"):
        sample(
            denoise, RectifiedFlow(prediction="noise"), SAMPLERS["euler"](), x, np.array([1.0, 0.0])
        )
    with pytest.raises(ConfigError, match="eta"):
        SAMPLERS["ddim"](eta=1.5)
    with pytest.raises(ConfigError, match="order"):
        SAMPLERS["unipc"](order=3)
    assert [f.name for f in dataclasses.fields(SAMPLERS["ddpm"]) if f.init] == []


# Parity with diffusers. Our times are taken from its timesteps or sigmas, and both sides ask
# the same toy network, which is fed our t.

STEPS = 8
KIND = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}


def toy(xp, x, t):
    return 0.6 * xp.sin(1.3 * x + 0.4) + 0.2 * x + 0.3 * t


def first_noise():
    return np.random.default_rng(0).normal(size=(2, 3, 2, 2, 4)).astype(np.float32)


def drawn_noise():
    """What both sides draw at each step, in place of their own generators."""
    return np.random.default_rng(1).normal(size=(STEPS, 2, 3, 2, 2, 4)).astype(np.float32)


def our_states(process, sampler, x, times, monkeypatch, network_time=lambda t: t):
    """Every point at which the network is evaluated, and the result."""
    states = []

    def denoise(x, t):
        jax.debug.callback(lambda x: states.append(np.asarray(x)), x, ordered=True)
        return toy(jnp, x, network_time(t[0]))

    table = jnp.asarray(drawn_noise())
    monkeypatch.setattr(samplers, "fresh_noise", lambda keys, i, shape: table[i])
    keys = jax.random.split(jax.random.key(0), len(x))
    out = sample(denoise, process, sampler, jnp.asarray(x), times, keys)
    jax.effects_barrier()
    return [*states, np.asarray(out)]


def their_states(scheduler, x, times, monkeypatch, scale=None, step_args=None):
    """The same of a diffusers scheduler, whose states divided by `scale` are our x."""
    torch = pytest.importorskip("torch")
    scale = np.ones(len(times) + 1) if scale is None else scale
    x = torch.from_numpy(x).double() * scale[0]
    states = [x / scale[0]]
    draws = iter(torch.from_numpy(drawn_noise()))
    # A scheduler draws only when it uses the noise, in the order of the steps.
    monkeypatch.setattr(
        type(scheduler).__module__ + ".randn_tensor", lambda *_, **__: next(draws), raising=False
    )
    for i, step in enumerate(scheduler.timesteps):
        prediction = toy(torch, states[-1], float(times[i]))
        x = scheduler.step(prediction, step, x, **(step_args or {})).prev_sample.double()
        states.append(x / scale[i + 1])
    return [np.asarray(s) for s in states]


def assert_same(ours, theirs, rtol=1e-5):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < rtol, f"state {i} differs by {error}"


def variance_preserving(scheduler_name, kind, **extra):
    """A process, a diffusers scheduler of the same betas, and the times of its timesteps."""
    diffusers = pytest.importorskip("diffusers")
    process = VariancePreserving(
        betas="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction=kind
    )
    scheduler = getattr(diffusers, scheduler_name)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=KIND[kind],
        timestep_spacing="trailing",
        **extra,
    )
    scheduler.set_timesteps(STEPS)
    times = np.append((scheduler.timesteps.double().numpy() + 1) / 1000, 0.0)
    np.testing.assert_allclose(times, uniform_timesteps(process, STEPS), atol=1e-7)
    return process, scheduler, times


@pytest.mark.parametrize(
    "row,scheduler_name,kind,fields,extra,step_args",
    [
        slow("ddpm", "DDPMScheduler", "noise", {}, {"clip_sample": False}, {}),
        ("ddpm", "DDPMScheduler", "v", {}, {"clip_sample": False}, {}),
        slow("ddim", "DDIMScheduler", "noise", {}, {"clip_sample": False}, {}),
        ("ddim", "DDIMScheduler", "x0", {}, {"clip_sample": False}, {}),
        ("ddim", "DDIMScheduler", "v", {"eta": 0.6}, {"clip_sample": False}, {"eta": 0.6}),
        slow("ddim", "DDIMScheduler", "noise", {"eta": 1.0}, {"clip_sample": False}, {"eta": 1.0}),
        slow("euler", "EulerDiscreteScheduler", "noise", {}, {}, {}),
        ("euler", "EulerDiscreteScheduler", "v", {}, {}, {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", "noise", {}, {}, {}),
        slow("dpmpp_2m", "DPMSolverMultistepScheduler", "v", {}, {}, {}),
        slow("unipc", "UniPCMultistepScheduler", "noise", {}, {}, {}),
        ("unipc", "UniPCMultistepScheduler", "x0", {}, {}, {}),
        ("unipc", "UniPCMultistepScheduler", "v", {"order": 1}, {"solver_order": 1}, {}),
        (
            "unipc",
            "UniPCMultistepScheduler",
            "noise",
            {"corrector": False},
            {"disable_corrector": list(range(STEPS))},
            {},
        ),
    ],
)
def test_diffusers_variance_preserving(
    row, scheduler_name, kind, fields, extra, step_args, monkeypatch
):
    process, scheduler, times = variance_preserving(scheduler_name, kind, **extra)
    scale = None
    if row == "euler":
        # Its states are x / alpha. The toy network is asked at our x in both.
        scale = np.sqrt(scheduler.sigmas.double().numpy() ** 2 + 1)
    ours = our_states(process, SAMPLERS[row](**fields), first_noise(), times, monkeypatch)
    theirs = their_states(scheduler, first_noise(), times, monkeypatch, scale, step_args)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "row,scheduler_name,extra",
    [
        ("euler", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"flow_shift": 3.0}),
        ("unipc", "UniPCMultistepScheduler", {"flow_shift": 3.0}),
    ],
)
def test_diffusers_flow(row, scheduler_name, extra, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    if row != "euler":
        extra = extra | {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = getattr(diffusers, scheduler_name)(**extra)
    scheduler.set_timesteps(STEPS)
    times = scheduler.sigmas.double().numpy()
    assert len(times) == STEPS + 1 and times[-1] == 0
    process = RectifiedFlow()
    ours = our_states(process, SAMPLERS[row](), first_noise(), times, monkeypatch)
    theirs = their_states(scheduler, first_noise(), times, monkeypatch)
    assert_same(ours, theirs)


def test_diffusers_flow_grid():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS))
    process = RectifiedFlow()
    times = uniform_timesteps(process, STEPS, shift=3.0)
    np.testing.assert_allclose(times, scheduler.sigmas, atol=1e-6)
    np.testing.assert_allclose(process.network_time(times[:-1]), scheduler.timesteps, rtol=1e-6)


def test_diffusers_heun_for_flow(monkeypatch):
    """Two evaluations a step on both sides; theirs lists the inner sigmas twice."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double().numpy()
    times = np.append(sigmas[:-1:2], sigmas[-1])
    asked = SAMPLERS["heun"]().plan(RectifiedFlow(), times)["t"]
    ours = our_states(RectifiedFlow(), SAMPLERS["heun"](), first_noise(), times, monkeypatch)
    theirs = their_states(scheduler, first_noise(), asked, monkeypatch)
    assert_same(ours, theirs)


def flow_scheduler(grid, steps, shift):
    """The scheduler of diffusers that a row of GRIDS comes with, set to that grid."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    code, _, name = grid.rpartition("_")
    if name in ("euler", "plain"):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps, sigmas=None if code else np.linspace(1, 1 / steps, steps))
        return scheduler
    kind = {"unipc": "UniPCMultistepScheduler", "dpmpp": "DPMSolverMultistepScheduler"}[name]
    scheduler = getattr(diffusers, kind)(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    if grid == "wan_unipc":
        scheduler.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1])
    elif grid == "wan_dpmpp":
        sigmas = torch.from_numpy(np.linspace(1, 0, steps + 1))
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        scheduler.sigmas = sigmas.float()
        scheduler.timesteps = (sigmas[:-1] * 1000).to(torch.int64)
    return scheduler


@pytest.mark.parametrize("steps", [4, 8, 20])
@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("name", TIMESTEPS)
def test_grids_of_public_models(name, steps, shift):
    """Times and network times."""
    scheduler, grid = flow_scheduler(name, steps, shift), TIMESTEPS[name](steps, shift)
    network = scheduler.timesteps.double().numpy()
    ulps = 2**-22 if name == "plain" else 0  # sigmas that are given to it are shifted in float32
    np.testing.assert_allclose(grid.times, scheduler.sigmas.double(), rtol=ulps, atol=0)
    np.testing.assert_allclose(grid.network, network, rtol=ulps, atol=0)
    np.testing.assert_allclose(grid.network_time(grid.times[:-1]), network, rtol=ulps, atol=0)


@pytest.mark.parametrize("steps", quick([4, 20], [4]))
@pytest.mark.parametrize("name", TIMESTEPS)
def test_states_on_the_grids_of_public_models(name, steps, monkeypatch):
    """Every state of the sampler that goes with a grid."""
    row = {"unipc": "unipc", "dpmpp": "dpmpp_2m"}.get(name.rpartition("_")[2], "euler")
    scheduler, grid = flow_scheduler(name, steps, 5.0), TIMESTEPS[name](steps, 5.0)
    network = scheduler.timesteps.double().numpy()
    ours = our_states(
        RectifiedFlow(),
        SAMPLERS[row](),
        first_noise(),
        grid.times,
        monkeypatch,
        network_time=lambda t: grid.network_time(t) / 1000,
    )
    assert_same(ours, their_states(scheduler, first_noise(), network / 1000, monkeypatch))


@pytest.mark.parametrize("name", TIMESTEPS)
def test_a_grid_of_nothing(name):
    for steps, shift in ((0, 3.0), (4, 0.0)):
        with pytest.raises(ConfigError, match="must be positive"):
            TIMESTEPS[name](steps, shift)
