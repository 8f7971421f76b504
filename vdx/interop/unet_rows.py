"""The keys of diffusers' U-Nets as paths of our parameters.

Motion modules and control branches have keys too. A network may come in several folders, such as an
image model and a motion adapter. The keys of a control branch begin with "control." here, which the
files do not have.
"""

from collections.abc import Iterator

from vdx.interop.image_vae import dense_rows, norm_rows, residual_rows
from vdx.interop.keymap import CONV, KEEP, LINEAR, Row, patches
from vdx.models.conditioning.text_signals import NULL
from vdx.models.denoiser import Denoiser

CONTROL = "control."  # prefix of the keys of a control branch


def unet_rows(
    model: Denoiser, linear: bool | None = None, control_linear: bool = False
) -> list[Row]:
    """Return the table between the keys of diffusers and our parameters.

    linear: the projections around attention in space are matrices, or convolutions; None: as the
    pretrained models have it. control_linear: the same in the control branch. `null`, the dropped
    text, is in no file; it is zero until it is set.
    """
    network = model.backbone
    convs = network.dims().blocks.temporal.convs
    if linear is None:
        linear = convs
    motion = "temp_attentions" if convs else "motion_modules"
    return [
        *_encoder_rows("", "network/encoder", linear, motion),
        *_layer_rows("up_blocks.{i}", "network/up_{i}_{j}", linear, motion),
        *dense_rows("up_blocks.{i}.upsamplers.0.conv", "network/up_{i}_conv", CONV),
        *norm_rows("conv_norm_out", "network/norm_out"),
        *dense_rows("conv_out", "network/conv_out", CONV),
        Row("", NULL),
        *_control_rows(bool(network.hint), control_linear),
    ]


def _encoder_rows(theirs: str, ours: str, linear: bool, motion: str) -> Iterator[Row]:
    """Yield the rows of the way down and the middle, which a ControlNet has as well."""
    yield from dense_rows(f"{theirs}conv_in", f"{ours}/conv_in", CONV)
    yield from dense_rows(f"{theirs}time_embedding.linear_1", f"{ours}/time/up", LINEAR)
    yield from dense_rows(f"{theirs}time_embedding.linear_2", f"{ours}/time/down", LINEAR)
    yield from transformer_rows(f"{theirs}transformer_in", f"{ours}/motion_in", linear=True)
    yield from _layer_rows(f"{theirs}down_blocks.{{i}}", f"{ours}/down_{{i}}_{{j}}", linear, motion)
    yield from _layer_rows(f"{theirs}mid_block", f"{ours}/middle_{{j}}", linear, motion)
    yield from dense_rows(
        f"{theirs}down_blocks.{{i}}.downsamplers.0.conv", f"{ours}/down_{{i}}_conv", CONV
    )


def _layer_rows(block: str, ours: str, linear: bool, motion: str) -> Iterator[Row]:
    """Yield the rows of the layers at index j of a block's lists.

    motion: the name of the list of motion modules.
    """
    yield from residual_rows(f"{block}.resnets.{{j}}", f"{ours}/res")
    yield from _time_conv_rows(f"{block}.temp_convs.{{j}}", f"{ours}/time_convs")
    yield from transformer_rows(f"{block}.attentions.{{j}}", f"{ours}/space", linear)
    yield from transformer_rows(f"{block}.{motion}.{{j}}", f"{ours}/motion", linear=True)


def transformer_rows(theirs: str, ours: str, linear: bool) -> Iterator[Row]:
    """Yield the rows of a SpaceTransformer or a TimeTransformer.

    In diffusers these are `Transformer2DModel`, `TransformerTemporalModel` and a motion module,
    of one layer each.
    """
    yield from norm_rows(f"{theirs}.norm", f"{ours}/norm")
    # Around the layer.
    layout = LINEAR if linear else patches((1, 1))
    for name in ("proj_in", "proj_out"):
        yield from dense_rows(f"{theirs}.{name}", f"{ours}/{name}", layout)

    # The layer: norms, attentions, the MLP.
    theirs = f"{theirs}.transformer_blocks.0"
    ours = f"{ours}/layer"
    for i in (1, 2, 3):
        yield Row(f"{theirs}.norm{i}.weight", f"{ours}/norm{i}/scale", KEEP)
        yield Row(f"{theirs}.norm{i}.bias", f"{ours}/norm{i}/bias", KEEP)
    for i in (1, 2):
        for name in "qkv":
            yield Row(f"{theirs}.attn{i}.to_{name}.weight", f"{ours}/attn{i}/{name}/kernel", LINEAR)
        yield from dense_rows(f"{theirs}.attn{i}.to_out.0", f"{ours}/attn{i}/out", LINEAR)
    yield from dense_rows(f"{theirs}.ff.net.0.proj", f"{ours}/mlp/up", LINEAR)
    yield from dense_rows(f"{theirs}.ff.net.2", f"{ours}/mlp/down", LINEAR)
    yield Row(f"{theirs}.pos_embed.pe", None)  # ours are computed


def _time_conv_rows(theirs: str, ours: str) -> Iterator[Row]:
    # Places of the convolutions in their lists: the first one has no dropout before it.
    for i, index in enumerate((2, 3, 3, 3)):
        yield from norm_rows(f"{theirs}.conv{i + 1}.0", f"{ours}/norm_{i}")
        yield from dense_rows(
            f"{theirs}.conv{i + 1}.{index}", f"{ours}/conv_{i}", patches((3, 1, 1))
        )


def _control_rows(deep: bool, linear: bool) -> Iterator[Row]:
    """Yield the rows of a control branch. deep: its maps pass several convolutions."""
    theirs = f"{CONTROL}controlnet_"
    ours = "network/control"
    yield from _encoder_rows(CONTROL, f"{ours}/encoder", linear, "motion_modules")

    hint = f"{ours}/hint"
    if deep:
        yield from dense_rows(f"{theirs}cond_embedding.conv_in", f"{hint}/conv_in", CONV)
        yield from dense_rows(f"{theirs}cond_embedding.conv_out", f"{hint}/conv_out", CONV)
        yield from dense_rows(f"{theirs}cond_embedding.blocks.{{i}}", f"{hint}/conv_{{i}}", CONV)
    else:
        yield from dense_rows(f"{theirs}cond_embedding", f"{hint}/conv_in", CONV)

    yield from dense_rows(f"{theirs}down_blocks.{{i}}", f"{ours}/out_{{i}}", patches((1, 1)))
    yield from dense_rows(f"{theirs}mid_block", f"{ours}/out_middle", patches((1, 1)))
