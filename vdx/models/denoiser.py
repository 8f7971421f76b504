"""The model that is trained: conditioning signals and a backbone, with one set of parameters."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.config.build import ConfigError, build
from vdx.flops import traced
from vdx.models.adapters.lora import Adapted
from vdx.models.conditioning.conditioning import Conditioning, Drop
from vdx.models.encoders.text import Tokenize
from vdx.models.mixers.context import CachePosition
from vdx.models.transformer import Transformer
from vdx.models.unet.unet import UNet
from vdx.types import Array, Batch, Params, Ports, PRNGKeyArray

BACKBONES: dict[str, Callable[..., nn.Module]] = {"transformer": Transformer, "unet": UNet}


class Denoiser(nn.Module):
    """`condition(batch, drop) -> ports`, `__call__(x_t, time, ports) -> prediction`.

    backbone_config: a row of BACKBONES with its fields. signals: rows of SIGNALS with theirs.
    """

    backbone_config: Mapping[str, Any]
    signals: Mapping[str, Mapping[str, Any]]

    def setup(self):
        self.network = self.backbone.clone(parent=self, name=None)
        self._conditioning = self.conditioning.clone(parent=self, name="conditioning")

    def __call__(
        self, x: Array, time: Array, ports: Ports, past: CachePosition | None = None
    ) -> Array:
        return self.network(x, time, ports) if past is None else self.network(x, time, ports, past)

    def condition(self, batch: Batch, drop: Drop) -> Ports:
        return self._conditioning(batch, drop)

    def train_view(self, x: Array, time: Array, batch: Batch, drop: Drop) -> Array:
        """Both at once: what a training step needs, and what creates every parameter."""
        return self(x, time, self.condition(batch, drop))

    @nn.nowrap
    def run(self, params: Params | Adapted, *args, method: str = "__call__", **more) -> Any:
        """`apply` with parameters, or these and adapters; `more`: collections such as `cache`
        and `told`, and `mutable`."""
        if isinstance(params, Adapted):
            return params.apply(self, *args, method=method, **more)
        mutable = more.pop("mutable", False)
        return self.apply({"params": params, **more}, *args, method=method, mutable=mutable)

    @nn.nowrap
    def precompute_cross_kv(self, params: Params | Adapted, *args, **more) -> Any:
        """The collection "cross_kv", for the same arguments: keys and values of the ports' tokens in
        all layers, which no sampler step changes, and which `run` takes. A program computes
        nothing else of the network for it."""
        return self.run(params, *args, mutable=["cross_kv"], **more)[1].get("cross_kv", {})

    @property
    def backbone(self) -> Any:
        """The network, unbound."""
        return build(self.backbone_config, BACKBONES, "config.model.backbone", parent=None)

    @property
    def conditioning(self) -> Conditioning:
        """The conditioning signals, unbound."""
        return Conditioning(self.backbone.dims().width, self.signals, parent=None)

    @nn.nowrap
    def new_params(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters. They depend on no size of the clip, so one patch is enough.

        Raises ConfigError for a backbone or a signal that cannot be built.
        """
        network, conditioning = self.backbone, self.conditioning
        x = jnp.zeros((1, *network.patch, network.channels))
        return self.init(
            key,
            x,
            jnp.zeros(1),
            conditioning.dummy_batch(x.shape[1:]),
            self.drop_masks(1, False),
            method="train_view",
        )["params"]

    @property
    def channels(self) -> int:
        return self.backbone.channels

    @property
    def block(self) -> int | None:
        """`Transformer.block`; None for another network."""
        network = self.backbone
        return network.block() if isinstance(network, Transformer) else None

    @nn.nowrap
    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Tokens of one clip of a batch of shape [b t h w c]."""
        return math.prod(self.backbone.grid(shape[1:]))

    @nn.nowrap
    def flops(self, shape: tuple[int, ...], text: int | None = None) -> float:
        """Operations of the matrix products and convolutions of one forward pass of one clip
        [t h w c], its conditions included, two to a multiply-add. text: tokens of cached text (a
        text that is read here has its own length). A training step takes three times that."""
        network, conditioning = self.backbone, self.conditioning
        batch = jax.eval_shape(lambda: conditioning.dummy_batch(shape))
        if text is not None and "embeddings" in self.signals:
            batch |= {
                k: jax.ShapeDtypeStruct((1, text, *v.shape[2:]), v.dtype)
                for k, v in batch.items()
                if k in ("text", "text_mask")
            }
        drop = jax.eval_shape(lambda: self.drop_masks(1, False))
        params = jax.eval_shape(conditioning.init, jax.random.key(0), batch, drop)
        ports = jax.eval_shape(conditioning.apply, params, batch, drop)
        return network.flops(shape, ports) + traced(conditioning.apply, params, batch, drop)

    @nn.nowrap
    def drop_masks(self, batch_size: int, dropped: bool) -> dict[str, Array]:
        return {name: jnp.full(batch_size, dropped) for name in self.signals}

    @nn.nowrap
    def from_clip(self, key: PRNGKeyArray, x0: Array) -> Batch:
        return self.conditioning.from_clip(key, x0)

    @nn.nowrap
    def missing_signals(self, batch: Batch) -> set[str]:
        return self.conditioning.missing_signals(batch)

    @nn.nowrap
    def fill_missing(self, batch: Batch, shape: tuple[int, ...]) -> dict[str, Array]:
        return self.conditioning.fill_missing(batch, shape)

    @nn.nowrap
    def random_drop(self, key: PRNGKeyArray, batch_size: int) -> dict[str, Array]:
        return self.conditioning.random_drop(key, batch_size)

    @nn.nowrap
    def tokenizer(self) -> Tokenize:
        """The host function caption -> (ids or features, mask) of this model's text signal."""
        rows = [self.conditioning.row(name, parent=None) for name in self.signals]
        found = [row for row in rows if hasattr(row, "tokenizer")]
        if len(found) != 1:
            raise ConfigError(
                "config.model.signals needs one signal that reads captions, 'text' "
                f"or 'embeddings', and has: {', '.join(self.signals) or 'none'}."
            )
        return found[0].tokenizer()
