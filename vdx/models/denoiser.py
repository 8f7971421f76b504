"""The model that is trained: conditioning signals and a backbone."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.config.build import ConfigError, build
from vdx.flops import traced
from vdx.models.adapters.lora import Adapted
from vdx.models.conditioning.base import Drop
from vdx.models.conditioning.conditioning import Conditioning
from vdx.models.encoders.tokenizer import Tokenizer
from vdx.models.mixers.context import CachePosition
from vdx.models.transformer import Transformer
from vdx.models.unet.unet import UNet
from vdx.types import Array, Batch, Float, Params, Ports, PRNGKeyArray

BACKBONES: dict[str, Callable[..., nn.Module]] = {"transformer": Transformer, "unet": UNet}

Time = Float[Array, "b *frames"]  # of each clip, or of each of its frames


class Denoiser(nn.Module):
    """Conditioning signals and a backbone."""

    backbone_config: Mapping[str, Any]  # a row of BACKBONES with its fields
    signals: Mapping[str, Any]  # rows of SIGNALS -> their fields, as a config has them

    def setup(self) -> None:
        """Bind the backbone and the signals to this module."""
        self.network = self.backbone.clone(parent=self, name=None)
        self._conditioning = self.conditioning.clone(parent=self, name="conditioning")

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        time: Time,
        ports: Ports,
        past: CachePosition | None = None,
    ) -> Float[Array, "b t h w c"]:
        """Predict, for a noisy clip; a `past` means that x is one block of a clip."""
        if past is None:
            return self.network(x, time, ports)
        return self.network(x, time, ports, past)

    def condition(self, batch: Batch, drop: Drop) -> Ports:
        """Map a batch to ports."""
        return self._conditioning(batch, drop)

    def train_view(
        self, x: Float[Array, "b t h w c"], time: Time, batch: Batch, drop: Drop
    ) -> Float[Array, "b t h w c"]:
        """Condition and predict, as a training step does; this creates every parameter."""
        return self(x, time, self.condition(batch, drop))

    @nn.nowrap
    def run(
        self, params: Params | Adapted, *args: Any, method: str = "__call__", **collections: Any
    ) -> Any:
        """Apply a method with parameters, or with parameters and adapters.

        `collections` are those besides the parameters, such as `cache` and `cross_kv`, and the
        option `mutable` of flax.
        """
        if isinstance(params, Adapted):
            return params.apply(self, *args, method=method, **collections)
        mutable = collections.pop("mutable", False)
        variables = {"params": params, **collections}
        return self.apply(variables, *args, method=method, mutable=mutable)

    @nn.nowrap
    def precompute_cross_kv(self, params: Params | Adapted, *args: Any, **collections: Any) -> Any:
        """Compute the collection "cross_kv" for `run`, from the same arguments.

        It holds keys and values of the ports' tokens in all layers, which no sampler step changes.
        A compiled program computes nothing else of the network for it.
        """
        _, updated = self.run(params, *args, mutable=["cross_kv"], **collections)
        return updated.get("cross_kv", {})

    @property
    def backbone(self) -> Any:
        """Return the network, unbound."""
        return build(self.backbone_config, BACKBONES, "config.model.backbone", parent=None)

    @property
    def conditioning(self) -> Conditioning:
        """Return the conditioning signals, unbound."""
        return Conditioning(self.backbone.dims().width, self.signals, parent=None)

    @nn.nowrap
    def new_params(self, key: PRNGKeyArray) -> Params:
        """Return fresh parameters.

        They depend on no size of the clip, so a clip of one patch is enough.

        Raises:
            ConfigError: the backbone or a signal cannot be built.
        """
        network = self.backbone
        x = jnp.zeros((1, *network.patch, network.channels))
        variables = self.init(
            key,
            x,
            jnp.zeros(1),
            self.conditioning.dummy_batch(x.shape[1:]),
            self.drop_masks(1, False),
            method="train_view",
        )
        return variables["params"]

    @property
    def channels(self) -> int:
        """Return the channels of a clip."""
        return self.backbone.channels

    @property
    def block(self) -> int | None:
        """Return `Transformer.block()`, or None for another network."""
        network = self.backbone
        return network.block() if isinstance(network, Transformer) else None

    @nn.nowrap
    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Return the tokens of one clip of a batch of shape [b t h w c]."""
        return math.prod(self.backbone.grid(shape[1:]))

    @nn.nowrap
    def flops(self, shape: tuple[int, ...], text: int | None = None) -> float:
        """Return the operations of one forward pass of one clip [t h w c].

        The conditioning is included. The operations are those of matrix products and convolutions,
        two to a multiply-add. A training step takes three times that. `text` is the number of
        tokens of cached text; captions that are encoded here have their own length.
        """
        conditioning = self.conditioning
        batch = jax.eval_shape(lambda: conditioning.dummy_batch(shape))
        if text is not None and "embeddings" in self.signals:
            for name in ("text", "text_mask"):
                entry = batch[name]
                batch[name] = jax.ShapeDtypeStruct((1, text, *entry.shape[2:]), entry.dtype)

        drop = jax.eval_shape(lambda: self.drop_masks(1, False))
        params = jax.eval_shape(conditioning.init, jax.random.key(0), batch, drop)
        ports = jax.eval_shape(conditioning.apply, params, batch, drop)
        network = self.backbone.flops(shape, ports)
        return network + traced(conditioning.apply, params, batch, drop)

    @nn.nowrap
    def drop_masks(self, batch_size: int, dropped: bool) -> dict[str, Array]:
        """Return masks that drop all signals of all clips, or none."""
        return {name: jnp.full(batch_size, dropped) for name in self.signals}

    @nn.nowrap
    def from_clip(self, key: PRNGKeyArray, x0: Float[Array, "b t h w c"]) -> Batch:
        """Call `Conditioning.from_clip`."""
        return self.conditioning.from_clip(key, x0)

    @nn.nowrap
    def missing_signals(self, batch: Collection[str]) -> set[str]:
        """Call `Conditioning.missing_signals`."""
        return self.conditioning.missing_signals(batch)

    @nn.nowrap
    def fill_missing(self, batch: Batch, shape: tuple[int, ...]) -> dict[str, Array]:
        """Call `Conditioning.fill_missing`."""
        return self.conditioning.fill_missing(batch, shape)

    @nn.nowrap
    def random_drop(self, key: PRNGKeyArray, batch_size: int) -> dict[str, Array]:
        """Call `Conditioning.random_drop`."""
        return self.conditioning.random_drop(key, batch_size)

    @nn.nowrap
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the text signal.

        Raises:
            ConfigError: the model has no signal that reads captions, or several.
        """
        signals = [self.conditioning.signal(name, parent=None) for name in self.signals]
        readers = [signal for signal in signals if hasattr(signal, "tokenizer")]
        if len(readers) != 1:
            raise ConfigError(
                "config.model.signals needs one signal that reads captions, 'text' "
                f"or 'embeddings', and has: {', '.join(self.signals) or 'none'}."
            )
        return readers[0].tokenizer()
