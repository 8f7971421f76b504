"""Pretrained T5 encoders: their keys, and models from their config.json.

Files are those of transformers, or `models_t5_umt5-xxl-enc-bf16.pth` of the original Wan.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from vdx.config.build import ConfigError, lookup
from vdx.config.ranges import Interval, PositiveFraction
from vdx.interop.config_ranges import Channels, Heads, Layers, Places, Vocabulary
from vdx.interop.keymap import KEEP, LINEAR, Row
from vdx.models.encoders.t5 import T5Encoder

__all__ = ["FIELDS", "config_fields", "t5_from_config", "t5_rows"]

# Fields of a config.json that are read.
FIELDS = {
    "model_type": str,
    "feed_forward_proj": str,
    "vocab_size": Vocabulary,
    "d_model": Channels,
    "num_layers": Layers,
    "num_heads": Heads,
    "d_kv": Heads,
    "d_ff": Channels,
    "relative_attention_num_buckets": Annotated[int, Interval(4, 100_000)],
    "relative_attention_max_distance": Places,
    "layer_norm_epsilon": PositiveFraction,
}
# Parts of a T5 layer, ours -> theirs.
_TRANSFORMERS = {
    "norm_a": "layer.0.layer_norm",
    "norm_b": "layer.1.layer_norm",
    "q": "layer.0.SelfAttention.q",
    "k": "layer.0.SelfAttention.k",
    "v": "layer.0.SelfAttention.v",
    "out": "layer.0.SelfAttention.o",
    "distance": "layer.0.SelfAttention.relative_attention_bias",
    "gate_up": "layer.1.DenseReluDense.wi_0",
    "up": "layer.1.DenseReluDense.wi_1",
    "down": "layer.1.DenseReluDense.wo",
}
_WAN = {
    "norm_a": "norm1",
    "norm_b": "norm2",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "out": "attn.o",
    "distance": "pos_embedding.embedding",
    "gate_up": "ffn.gate.0",
    "up": "ffn.fc1",
    "down": "ffn.fc2",
}
# The parameter of a part and its layout; of all other parts ("kernel", LINEAR).
_LEAVES = {"norm_a": ("scale", KEEP), "norm_b": ("scale", KEEP), "distance": ("table", KEEP)}


def t5_rows(keys: Collection[str], model: T5Encoder) -> tuple[Row, ...]:
    """Return the table between the keys of a T5 file and `model`.

    The keys decide the layout.
    """
    if "token_embedding.weight" in keys:
        block = "blocks.{i}"
        parts = _WAN
        rows = [Row("token_embedding.weight", "words/embedding"), Row("norm.weight", "norm/scale")]
    else:
        block = "encoder.block.{i}"
        parts = _TRANSFORMERS
        # One table under two names; a file has either of them, or both with the same content.
        second_name = None if "shared.weight" in keys else "words/embedding"
        rows = [
            Row("shared.weight", "words/embedding"),
            Row("encoder.embed_tokens.weight", second_name),
            Row("encoder.final_layer_norm.weight", "norm/scale"),
        ]

    for ours, theirs in parts.items():
        leaf, layout = _LEAVES.get(ours, ("kernel", LINEAR))
        # T5 has its one bias in the first layer.
        if ours == "distance" and model.shared_bias:
            rows.append(Row(f"{block.format(i=0)}.{theirs}.weight", "distance/table"))
        else:
            rows.append(Row(f"{block}.{theirs}.weight", f"layers/{ours}/{leaf}[{{i}}]", layout))
    return tuple(rows)


def config_fields(config: Mapping[str, Any], names: Mapping[str, str], of: str) -> dict[str, Any]:
    """Return {our field: value} for the sizes in a config.json.

    names: ours -> theirs, which it must have. of: the kind of model, for the message. Raises
    ConfigError for missing names.
    """
    missing = [theirs for theirs in names.values() if theirs not in config]
    if missing:
        raise ConfigError(
            f"The config.json of a {of} lacks {', '.join(missing)}; it has "
            f"{', '.join(config) or 'nothing'}."
        )
    return {ours: config[theirs] for ours, theirs in names.items()}


def t5_from_config(config: Mapping[str, Any], dtype: str = "float32") -> T5Encoder:
    """Build the encoder that a config.json of transformers describes.

    Raises ConfigError for another kind of model, for a T5 older than v1.1, whose MLP has no
    gate, and for missing sizes.
    """
    # The kind of model.
    shared_bias = lookup(
        str(config.get("model_type")),
        {"umt5": False, "t5": True},
        "config.json of a T5: model_type",
    )

    # The defaults are those of transformers: T5's is the ungated MLP.
    mlp = config.get("feed_forward_proj", "relu" if shared_bias else "gated-gelu")
    if mlp != "gated-gelu":
        raise ConfigError(
            f"config.json of a T5: feed_forward_proj = {mlp!r}; only 'gated-gelu' "
            "(T5 v1.1, UMT5) is known here."
        )

    # Sizes, which have no default.
    sizes = config_fields(
        config,
        {
            "vocabulary": "vocab_size",
            "width": "d_model",
            "depth": "num_layers",
            "heads": "num_heads",
            "head_width": "d_kv",
            "hidden": "d_ff",
        },
        "T5",
    )

    return T5Encoder(
        **sizes,
        **_distances(config),
        shared_bias=shared_bias,
        dtype=dtype,
        eps=config.get("layer_norm_epsilon", 1e-6),
    )


def _distances(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the fields of `distance_buckets`.

    Raises ConfigError if the distances beyond the exact ones have no room up to the farthest.
    """
    buckets = config.get("relative_attention_num_buckets", 32)
    farthest = config.get("relative_attention_max_distance", 128)
    if farthest <= buckets // 4:
        raise ConfigError(
            f"config.json of a T5: relative_attention_max_distance = {farthest} must exceed a "
            f"quarter of relative_attention_num_buckets = {buckets}."
        )
    return {"buckets": buckets, "farthest": farthest}
