"""One training step: noise a clip, predict, compare, update. Pure, jitted once per clip shape."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vdx.config.build import ConfigError
from vdx.diffusion.losses import bin_by_time, denoising_error, denoising_loss
from vdx.models.adapters.lora import Adapted, Lora
from vdx.models.adapters.trainable import Trainable
from vdx.models.denoiser import Denoiser
from vdx.train.state import TrainState
from vdx.types import Array, Batch, Params, PRNGKeyArray

Metrics = dict[str, Array]
_FIRST_FRAME = 0xF1  # folded into the key of a step; its other draws split that key
_DERIVED = 0xDE
SPIKE_MEMORY = 100  # accepted steps that the running mean of the gradient norm looks back


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is learned: process, distribution of times, weight of the loss.

    part: what is trained if not the whole network: adapters beside it, or some of its parameters;
    the rest is frozen. first_frame: share of the clips whose first latent frame is given, without
    noise and at time 0, as Wan 2.2 TI2V continues an image. forcing: every block of a clip (see
    Transformer; without blocks every frame of tokens) has a time of its own (Chen et al. 2024,
    diffusion forcing), so that a noisy block learns to follow clean ones.
    """

    model: Denoiser
    process: Any
    times: Any
    weight: Any
    bins: int = 5
    mean: float = 0.0
    part: Lora | Trainable | None = None
    first_frame: float = 0.0
    forcing: bool = False

    def __post_init__(self):
        if self.forcing and self.first_frame:
            raise ConfigError(
                f"config.first_frame = {self.first_frame} sets times, and so does "
                "config.diffusion_forcing: choose one."
            )

    def whole(
        self, trained: Params, frozen: Params | None, key: PRNGKeyArray | None = None
    ) -> Params | Adapted:
        """What the network runs with; key: of a training step, for the adapters' dropout."""
        if self.part is None:
            return trained
        assert frozen is not None
        return self.part.combine(frozen, trained, key)

    def clean(self, batch: Batch) -> Array:
        """x0 [b t h w c] float32: cached latents as they are, or pixels from uint8 to [-1, 1],
        less their mean (a constant offset is slow to learn)."""
        if "latents" in batch:
            return batch["latents"].astype(jnp.float32)
        return batch["video"].astype(jnp.float32) / 127.5 - 1.0 - self.mean

    def losses(
        self,
        params: Params | Adapted,
        batch: Batch,
        t: Array,
        noise: Array,
        drop,
        known: Array | None = None,
    ) -> Array:
        """Per-clip loss [b] at times t [b] for this noise and these dropped signals.

        known: bool [b], clips whose first frame is given; it has no part in their loss.
        """
        loss_mask, frames = None, noise.shape[1]
        if known is not None:
            first = (jnp.arange(frames) == 0) & (frames > 1)  # not of an image
            loss_mask = ~(known[:, None] & first)  # b t
            t = jnp.where(loss_mask, t[:, None], 0.0)
        return denoising_loss(
            self.process, self.weight, *self.predict(params, batch, t, noise, drop), t, loss_mask
        )

    def predict(
        self, params: Params | Adapted, batch: Batch, t: Array, noise: Array, drop
    ) -> tuple[Array, Array, Array]:
        """The prediction for the clips with this noise at times t [b] or [b t], and (x0, noise)."""
        x0 = self.clean(batch)
        x_t = self.process.add_noise(x0, noise, t)
        return (
            self.model.run(
                params, x_t, self.process.network_time(t), batch, drop, method="train_view"
            ),
            x0,
            noise,
        )

    def draw(self, batch: Batch, key: PRNGKeyArray):
        """Times [b], with `forcing` [b t], noise like x0, and drop masks, all from one key."""
        x0 = self.clean(batch)
        k_time, k_noise, k_drop = jax.random.split(key, 3)
        clips, tokens = x0.shape[0], self.model.num_tokens(x0.shape)
        if self.forcing:
            size = self.model.backbone.patch[0] * (self.model.block or 1)
            blocks = -(-x0.shape[1] // size)
            t = self.times.sample(k_time, clips * blocks, tokens).reshape(clips, blocks)
            t = jnp.repeat(t, size, 1)[:, : x0.shape[1]]
        else:
            t = self.times.sample(k_time, clips, tokens)
        noise = jax.random.normal(k_noise, x0.shape)
        return t, noise, self.model.random_drop(k_drop, x0.shape[0])

    def from_clip(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """The batch with what signals make of its own clips, such as known frames."""
        return {
            **batch,
            **self.model.from_clip(jax.random.fold_in(key, _DERIVED), self.clean(batch)),
        }

    def loss(
        self, params: Params | Adapted, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        (t, noise, drop), known = self.draw(batch, key), None
        batch = self.from_clip(batch, key)
        if self.first_frame:
            known = jax.random.bernoulli(
                jax.random.fold_in(key, _FIRST_FRAME), self.first_frame, t.shape
            )
        if self.forcing:
            losses = denoising_error(
                self.process, self.weight, *self.predict(params, batch, t, noise, drop), t
            ).mean((2, 3, 4))  # b t
        else:
            losses = self.losses(params, batch, t, noise, drop, known)
        sums, counts = bin_by_time(losses.ravel(), t.ravel(), self.bins)
        return losses.mean(), {"bin_sums": sums, "bin_counts": counts}


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    ema_decay: float,
    accumulate: int = 1,
    spike: float = 0.0,
) -> Callable[..., tuple]:
    """step(state, batch, frozen=None) -> (state, metrics). The caller jits it, with shardings and
    donation of the state. frozen: the weights that are not trained, if only a part is.

    With `accumulate` = a the batch is cut into a microbatches and gradients are averaged. A batch
    whose loss or gradient is not finite, or whose gradient norm is over `spike` times the running
    mean (0: any norm will do), is refused: the step counts, and nothing else changes in any bit.
    """

    def loss(params, frozen, batch, key):
        return objective.loss(objective.whole(params, frozen, key), batch, key)

    grad_fn = jax.value_and_grad(loss, has_aux=True)

    def gradients(params, frozen, batch, key):
        if accumulate == 1:
            return grad_fn(params, frozen, batch, key)
        # Strided, so that a microbatch takes rows from every device's share.
        micro = {
            k: jnp.swapaxes(v.reshape(-1, accumulate, *v.shape[1:]), 0, 1) for k, v in batch.items()
        }

        def body(total, inputs):
            one, i = inputs
            new = grad_fn(params, frozen, one, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, new), None

        shapes = jax.eval_shape(grad_fn, params, frozen, jax.tree.map(lambda v: v[0], micro), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        ((loss, aux), grads), _ = jax.lax.scan(body, zeros, (micro, jnp.arange(accumulate)))
        return (loss / accumulate, aux), jax.tree.map(lambda g: g / accumulate, grads)

    def step(
        state: TrainState, batch: Batch, frozen: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        (loss, aux), grads = gradients(state.params, frozen, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The average follows quickly at first: early samples should not show initial weights.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema, 1.0 - decay)
        norm, n = optax.tree.norm(grads), state.accepted
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        if spike:
            ok &= (n < SPIKE_MEMORY) | (norm <= spike * state.norm)
        new = state.replace(
            params=params,
            opt_state=opt_state,
            ema=ema,
            accepted=n + 1,
            norm=state.norm + (norm - state.norm) / jnp.minimum(n + 1, SPIKE_MEMORY),
        )
        kept = jax.tree.map(lambda a, b: a if a is b else jnp.where(ok, a, b), new, state)
        metrics = {"loss": loss, "grad_norm": norm, "ok": ok, "accepted": kept.accepted, **aux}
        return kept.replace(step=state.step + 1), metrics

    return step


def make_eval_step(objective: Objective, levels: tuple[float, ...]):
    """eval(params, batch, key) -> per-clip losses [levels b], with and without conditioning.

    Noise is fixed by `key`, so that two evaluations differ by the weights alone.
    """

    def evaluate(params: Params | Adapted, batch: Batch, key: PRNGKeyArray) -> tuple[Array, Array]:
        x0, batch = objective.clean(batch), objective.from_clip(batch, key)
        b = x0.shape[0]

        def at(level_key):
            level, k = level_key
            noise = jax.random.normal(k, x0.shape)
            t = jnp.full(b, level)
            keep = objective.model.drop_masks(b, False)
            null = objective.model.drop_masks(b, True)
            return (
                objective.losses(params, batch, t, noise, keep),
                objective.losses(params, batch, t, noise, null),
            )

        return jax.lax.map(at, (jnp.asarray(levels), jax.random.split(key, len(levels))))

    return evaluate
