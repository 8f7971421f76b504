"""The spatiotemporal transformer.

Its stages are patches -> blocks of (mixer, cross-attention, MLP) -> patches. Modulation is
adaLN-single (Chen et al. 2023, PixArt-alpha; also Wan): one projection of the time embedding for
the whole network plus a learned table in each block. The design is that of Wan 2.1 and 2.2, so that
their weights are a configuration of this class (vdx/interop/wan.py).
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vdx.config.build import ConfigError, lookup
from vdx.config.ranges import ComputeType, Count, Index, OneOf, Positive
from vdx.models.attention.backends import BACKENDS, CONTEXTS
from vdx.models.layers import ACTIVATIONS, EmbedMLP, add_vector, along_last
from vdx.models.mixers.context import CachePosition, Grid, MixContext
from vdx.models.mixers.table import PATTERNS
from vdx.models.patches import from_patches, low_frequencies, to_patches
from vdx.models.positions import place_table, plane_table, rope_table, shift_rope, sincos_table
from vdx.models.remat import REMAT
from vdx.models.transformer_blocks import (
    CROSS,
    Period,
    Stream,
    TransformerDims,
    modulate,
    standalone_mixer,
)
from vdx.models.transformer_flops import transformer_flops
from vdx.parallel import constrain
from vdx.types import Array, Float, Ports


class Size(NamedTuple):
    """The size of a transformer."""

    width: int  # features of a token
    depth: int  # blocks
    heads: int  # of attention
    mlp_ratio: float  # hidden features of the MLP for each feature of the width


SIZES: dict[str, Size] = {
    "tiny": Size(192, 6, 6, 4),
    "S": Size(384, 12, 6, 4),
    "B": Size(768, 12, 12, 4),
    "L": Size(1024, 24, 16, 4),
    "XL": Size(1152, 28, 9, 4),  # heads of 128: a TPU pads those of 72 to 128
    "wan_1p3b": Size(1536, 30, 12, 8960 / 1536),  # Wan 2.1
    "wan_5b": Size(3072, 30, 24, 14336 / 3072),  # Wan 2.2 TI2V
    "wan_14b": Size(5120, 40, 40, 13824 / 5120),  # Wan 2.1, and each expert of Wan 2.2 A14B
}


class Transformer(nn.Module):
    """A network denoiser(x_t [b t h w c], time, ports) -> prediction [b t h w c]."""

    channels: Count = 3  # of the clip and of the prediction
    size: Annotated[str, OneOf(lambda: SIZES)] = "tiny"  # a row of SIZES
    patch: tuple[Count, Count, Count] = (
        1,
        2,
        2,
    )  # frames, rows and columns of one token; the clip must divide by it
    # A row of PATTERNS, or a tuple of rows of MIXERS, each a name or {"name": row, **fields}. It is
    # repeated over the depth. With the port `control` each repetition has one control block.
    pattern: Annotated[str, OneOf(lambda: PATTERNS)] | tuple[str | Mapping[str, Any], ...] = "full"
    width: Count | None = None  # features of a token; None: those of `size`
    depth: Count | None = None  # blocks; None: those of `size`
    heads: Count | None = None  # None: those of `size`
    mlp_ratio: Positive | None = None  # hidden features of the MLP for each of the width
    activation: Annotated[str, OneOf(lambda: ACTIVATIONS)] = "gelu"  # a row of ACTIVATIONS
    # Sets the slowest rotation of the rotary positions; a grid of a few tokens needs a small one.
    rope_theta: Positive = 10_000.0
    # Add each token's place in the clip to it. Attention can then average places (to locate an
    # object), which a network with rotary positions alone learns much later.
    absolute: bool = False
    # Add fixed positions (Latte): those in a frame, which is this many places long, to its patches;
    # those in time before the first block over time alone. 0: none.
    sincos: Index = 0
    cross: Annotated[str, OneOf(lambda: CROSS)] = "normed"  # a row of CROSS
    # Also map the port `concat` to the prediction directly, by a linear map of each patch, zero at
    # first. A given frame then need not pass through a narrow width.
    skip: bool = False
    # Multiplies the time before it is embedded. Below 1 neighbouring noise levels share more of
    # what is learned, which a short training needs.
    time_scale: Positive = 1.0
    remat: Annotated[str, OneOf(lambda: REMAT)] = "none"  # a row of REMAT
    attention: Annotated[str, OneOf(lambda: ("auto", *BACKENDS))] = (
        "auto"  # "auto" or a row of BACKENDS
    )
    # A row of CONTEXTS, for "full" attention without blocks on a mesh that splits tokens.
    context: Annotated[str, OneOf(lambda: CONTEXTS)] = "gather"
    dtype: ComputeType = "float32"  # of the matrix products

    def dims(self) -> TransformerDims:
        """Resolve and check the dimensions.

        Raises:
            ConfigError: a name is unknown, or numbers do not divide.
        """
        size = lookup(self.size, SIZES, "model.size")
        width = self.width or size.width
        depth = self.depth or size.depth
        heads = self.heads or size.heads

        # A name of PATTERNS, names of MIXERS or specs of them -> specs, which are built once.
        pattern = self.pattern
        if isinstance(pattern, str):
            pattern = lookup(pattern, PATTERNS, "model.pattern")
        specs = tuple({"name": row} if isinstance(row, str) else dict(row) for row in pattern)
        for spec in specs:
            standalone_mixer(spec, heads)

        # The other names, and the divisions.
        lookup(self.cross, CROSS, "model.cross")
        lookup(self.attention, {"auto": None, **BACKENDS}, "model.attention")
        lookup(self.context, CONTEXTS, "model.context")
        if depth % len(specs):
            raise ConfigError(f"model.depth = {depth} is not a multiple of the pattern {specs}.")
        if width % (2 * heads):
            raise ConfigError(f"model.width = {width} over {heads} heads is not an even number.")
        return TransformerDims(width, depth, heads, specs)

    def over_time(self) -> list[Any]:
        """Return the mixers of the pattern through which a token reads other frames."""
        mixers = [standalone_mixer(spec) for spec in self.dims().pattern]
        return [mixer for mixer in mixers if mixer.crosses_frames]

    def block(self) -> int | None:
        """Return the frames of tokens in a block, if a clip can be made block by block.

        It can if all mixers over time have blocks of the same size; otherwise None.
        """
        sizes = {mixer.causal_block for mixer in self.over_time()}
        return sizes.pop() if len(sizes) == 1 else None

    def hidden(self) -> int:
        """Return the hidden features of the MLPs."""
        ratio = self.mlp_ratio or lookup(self.size, SIZES, "model.size").mlp_ratio
        return round(self.dims().width * ratio)

    def grid(self, shape: tuple[int, ...]) -> Grid:
        """Return the token grid of a clip [t h w c].

        Raises:
            ValueError: the clip does not divide into patches.
        """
        if any(n % p for n, p in zip(shape[:3], self.patch, strict=True)):
            raise ValueError(
                f"A clip of {shape[:3]} (t, h, w) does not divide into patches of "
                f"{self.patch}; choose sizes that are multiples of the patch."
            )
        t, h, w = (n // p for n, p in zip(shape[:3], self.patch, strict=True))
        return t, h, w

    def flops(self, shape: tuple[int, ...], ports: Ports) -> float:
        """Return the operations of one forward pass of one clip [t h w c].

        They are those of the matrix products, two to a multiply-add. The ports may be of a batch
        of any size; their shapes are enough.
        """
        return transformer_flops(self, shape, ports)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        time: Float[Array, "b *frames"],
        ports: Ports,
        past: CachePosition | None = None,
    ) -> Float[Array, "b t h w c"]:
        """Predict, for a noisy clip.

        Args:
            x: the noisy clip.
            time: one for each clip [b], or one for each frame [b t] (Wan 2.2 TI2V: 0 for a known
                first frame; diffusion forcing). A patch takes the time of its first frame.
            ports: the conditioning.
            past: set if x is one block of a clip. The collection "cache" then holds keys, values
                and states of the blocks before it.
        """
        grid = self.grid(x.shape[1:])  # t h w, smaller than the clip by the patch
        skipped = self.skip_network(ports.concat)  # b t h w k
        tokens = self.embed(x, ports, grid)  # b t h w d
        emb = self.embed_time(x, time, ports.vector, grid)  # b d or b t d
        modulation = self.embed_modulation(emb, ports.modulation)  # b t 6 d, or b 1 6 d
        control = self.embed_control(ports.control, tokens)  # b t h w d
        context = self.mix_context(grid, past)

        stream = Stream(tokens, control, self.frame_positions(grid))
        tokens = self.run_blocks(stream, modulation, self.cast_tokens(ports), context)

        return from_patches(skipped + self.head(tokens, emb), self.patch)

    def skip_network(
        self, concat: Float[Array, "b T H W c"] | None
    ) -> Float[Array, "b t h w k"] | float:
        """Map the concatenated channels to the prediction, or return 0 without `skip`."""
        if concat is None or not self.skip:
            return 0.0
        project = nn.Dense(
            math.prod(self.patch) * self.channels,
            name="skip",
            dtype=jnp.float32,
            use_bias=False,
            kernel_init=nn.initializers.zeros,
        )
        return project(to_patches(concat, self.patch))

    def embed(
        self, x: Float[Array, "b T H W c"], ports: Ports, grid: Grid
    ) -> Float[Array, "b t h w d"]:
        """Embed patches: the clip, concatenated channels, positions, control residuals."""
        if ports.concat is not None:
            x = jnp.concatenate([x, ports.concat.astype(x.dtype)], -1)
        x = self.embed_patches(x, "patch")

        # Fixed positions.
        width = self.dims().width
        if self.absolute:
            # With blocks it is the place in the block: the length of the clip is not known.
            frames = self.block() or grid[0]
            places = place_table((frames, *grid[1:]), width)
            places = places[np.arange(grid[0]) % frames]
            x = x + jnp.asarray(places, x.dtype)[None]
        if self.sincos:
            plane = plane_table(grid[1:], width, self.sincos)
            x = x + jnp.asarray(plane, x.dtype)[None, None]

        if ports.add is not None:
            x = x + ports.add.astype(x.dtype)
        return constrain(x, "b t h w d", context="t")

    def embed_patches(self, x: Float[Array, "b T H W c"], name: str) -> Float[Array, "b t h w d"]:
        """Project patches; a fresh projection keeps their lowest frequencies."""
        project = nn.Dense(
            self.dims().width,
            name=name,
            dtype=jnp.dtype(self.dtype),
            kernel_init=low_frequencies(self.patch),
        )
        return project(to_patches(x, self.patch))

    def frame_positions(self, grid: Grid) -> Float[Array, "t 1 1 d"] | None:
        """Return fixed positions in time, if `sincos` is set and the clip is not an image."""
        frames = grid[0]
        if not self.sincos or frames == 1:
            return None
        table = sincos_table(np.arange(frames), self.dims().width)
        return jnp.asarray(table, jnp.dtype(self.dtype))[:, None, None]

    def embed_time(
        self,
        x: Float[Array, "b t h w c"],
        time: Float[Array, "b *frames"],
        vector: Float[Array, "b *more d"] | None,
        grid: Grid,
    ) -> Float[Array, "b d"] | Float[Array, "b n d"]:
        """Embed the time and the vector, for each clip or for each frame of tokens.

        Raises:
            ValueError: the time is neither [b] nor [b t].
        """
        # One time for each frame -> one for each frame of tokens.
        if time.ndim != 1:
            if time.shape != x.shape[:2]:
                raise ValueError(
                    f"time is {time.shape}; a clip of {x.shape[:2]} (b, t) needs one time "
                    "for each clip [b] or for each frame [b t]."
                )
            time = time[:, :: self.patch[0]]

        emb = EmbedMLP(self.dims().width, name="time")(time * self.time_scale)
        if vector is not None:
            emb = add_vector(emb, vector, grid[0])
        return emb

    def embed_modulation(
        self,
        emb: Float[Array, "b d"] | Float[Array, "b t d"],
        added: Float[Array, "b 6 d"] | None,
    ) -> Float[Array, "b n 6 d"]:
        """Project the embedding to the shifts, scales and gates of a block."""
        width = emb.shape[-1]
        project = nn.Dense(
            6 * width, name="modulation", dtype=jnp.float32, kernel_init=nn.initializers.zeros
        )
        modulation = project(nn.silu(emb)).reshape(len(emb), -1, 6, width)
        if added is not None:
            modulation = modulation + added[:, None]
        return modulation

    def embed_control(
        self, control: Float[Array, "b T H W c"] | None, tokens: Float[Array, "b t h w d"]
    ) -> Float[Array, "b t h w d"] | None:
        """Embed the port `control` and add it to the tokens, for the control blocks."""
        if control is None:
            return None
        project = nn.Dense(
            tokens.shape[-1],
            name="control_in",
            dtype=jnp.dtype(self.dtype),
            kernel_init=nn.initializers.zeros,
        )
        control = project(self.embed_patches(control, "control_patch"))
        return constrain(tokens + control, "b t h w d", context="t")

    def cast_tokens(self, ports: Ports) -> Ports:
        """Cast the tokens of cross-attention to the type of the matrix products."""
        dtype = jnp.dtype(self.dtype)
        if ports.tokens is not None:
            ports = ports.replace(tokens=ports.tokens.astype(dtype))
        if ports.image_tokens is not None:
            ports = ports.replace(image_tokens=ports.image_tokens.astype(dtype))
        return ports

    def mix_context(self, grid: Grid, past: CachePosition | None) -> MixContext:
        """Build the rotary tables, those of a block at its place in the clip."""
        head_width = self.dims().head_width
        rope = rope_table(grid, head_width, self.rope_theta)
        if past is not None:
            rope = shift_rope(rope, past.start, head_width, self.rope_theta)
        return MixContext(rope, past, self.attention, self.context)

    def run_blocks(
        self,
        stream: Stream,
        modulation: Float[Array, "b n 6 d"],
        ports: Ports,
        context: MixContext,
    ) -> Float[Array, "b t h w d"]:
        """Run all blocks: one pass through the pattern, scanned over the depth."""
        # Recompute a pass of the pattern as the policy says, and repeat it over the depth.
        dims = self.dims()
        policy = lookup(self.remat, REMAT, "model.remat")
        period = Period if policy is None else nn.remat(Period, policy=policy, prevent_cse=False)
        scanned = nn.scan(
            period,
            variable_axes={"params": 0, "lora": 0, "cache": 0, "cross_kv": 0},
            split_rngs={"params": True, "lora": True},
            in_axes=nn.broadcast,
            length=dims.periods,
            # The check traces the body twice, and moves the random numbers that layers draw.
            check_constancy_invariants=self.is_initializing() or self.has_rng("lora"),
        )

        # One set of fields and, in each layer of the scan, one set of parameters.
        layers = scanned(
            dims.pattern,
            dims.heads,
            self.hidden(),
            self.activation,
            self.cross,
            jnp.dtype(self.dtype),
            name="layers",
        )
        stream, _ = layers(stream, modulation, ports, context)
        return stream.x

    def head(
        self,
        x: Float[Array, "b t h w d"],
        emb: Float[Array, "b d"] | Float[Array, "b t d"],
    ) -> Float[Array, "b t h w k"]:
        """Modulate the tokens and project them to patches, in float32."""
        width = x.shape[-1]
        table = self.param("table", nn.initializers.zeros, (2, width), jnp.float32)
        shift, scale = (
            (emb + along_last(row, emb)).reshape(len(x), -1, 1, 1, width) for row in table
        )
        x = modulate(x, shift, scale).astype(jnp.dtype(self.dtype))

        project = nn.Dense(
            math.prod(self.patch) * self.channels,
            name="unpatch",
            dtype=jnp.float32,
            kernel_init=low_frequencies(self.patch, out=True),
        )
        return project(x)
