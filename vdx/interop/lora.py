"""LoRA files for Wan transformers: four layouts are read, two are written.

    diffusers   transformer[_2].blocks.0.attn1.to_q.lora_{A,B}.weight, `lora_adapter_metadata`
    peft        base_model.model.blocks.0.attn1.to_q.lora_{A,B}.weight, adapter_config.json
    ComfyUI     diffusion_model.blocks.0.self_attn.q.lora_{A,B | down,up}.weight
    kohya       lora_unet_blocks_0_self_attn_q.lora_{down,up}.weight

The first two and the last two differ in how they name layers; any prefix is taken with any names.
`.alpha` scales by alpha / rank, and without it, or an alpha in the metadata, the scale is 1.
`.diff`, `.diff_b` and `.lora_B.bias` are whole differences of a weight or a bias. Layers' names and
the order of their channels come from the rows of vdx.interop.wan_keys, as those of the weights do.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from vdx.config.build import lookup
from vdx.files import read_json
from vdx.interop.keymap import LINEAR, Layout, Row, WeightsError, export, flat, listed, slot_finder
from vdx.interop.load import open_weights
from vdx.interop.safetensors import read_file, write
from vdx.interop.save import export_plan
from vdx.interop.stored_array import StoredArray
from vdx.interop.wan_keys import original_name, wan_transformer_rows
from vdx.models.adapters.lora import A, B, WeightDelta
from vdx.models.denoiser import Denoiser
from vdx.types import Params

__all__ = ["LAYOUTS", "open_lora", "write_lora"]

PART = re.compile(
    r"^(?:base_model\.model\.)?(?:(?P<part>transformer(?:_2)?)\.|"
    r"(?:model\.)?diffusion_model\.|lora_unet_)?(?P<rest>.*)$"
)
LEAF = re.compile(
    r"^(?P<layer>.+?)\.(?:lora_(?P<half>A|B|down|up)(?:\.\w+)?\.(?P<of>weight|bias)"
    r"|(?P<other>alpha|diff|diff_b))$"
)
HALVES = {"A": "A", "down": "A", "B": "B", "up": "B"}
SETTINGS, SAFETENSORS = "lora_adapter_metadata", ".safetensors"
LAYOUTS: dict[str, Callable[[str, str], str]] = {
    "diffusers": lambda layer, part: f"{part}.{layer}",
    "comfyui": lambda layer, part: f"diffusion_model.{original_name(layer)}",
}


def adapter_rows(rows: Sequence[Row], plan: Mapping[str, Any]) -> list[Row]:
    """Rows of the factors of every kernel that `rows` name; `plan`: export_plan of the weights.

    A weight is B A, and its layout moves its inputs, which are A's, or its outputs, which are
    B's: A is transposed, and B is laid out like the weight. Of a convolution it is A that has
    the kernel's extent.
    """

    def outputs(extent: int) -> Layout:
        return Layout(
            lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T.reshape(*x.shape[::-1], *[1] * extent)
        )

    out = []
    for row in rows:
        if row.path is None or not row.source.endswith(".weight") or "/kernel" not in row.path:
            continue
        layer, extent = row.source.removesuffix(".weight"), len(plan[row.source][0]) - 2
        for half, leaf, layout in (
            ("A", A, row.layout if extent else LINEAR),
            ("B", B, outputs(extent) if extent else row.layout),
        ):
            out.append(Row(f"{layer}.lora_{half}.weight", row.path.replace("kernel", leaf), layout))
    return out


def open_lora(path: str | Path, model: Denoiser, part: str = "transformer") -> WeightDelta:
    """What a LoRA file, or a folder that holds one, changes in a Wan model: float32 arrays on
    the host, with every scale in them. See vdx.models.adapters.lora.adapt.

    part: of a file for both experts of Wan 2.2 A14B, "transformer" (high noise) or
    "transformer_2". Raises WeightsError that lists every key and shape that is not of this model.
    """
    shapes, rows = jax.eval_shape(model.new_params, jax.random.key(0)), wan_transformer_rows(model)
    plan = export_plan(shapes, rows)
    source, settings = _open(Path(path), part)
    problems: list[str] = []
    layers = _by_layer(source, plan, part, problems)
    factors = _Factors(flat(shapes), slot_finder(adapter_rows(rows, plan)))
    deltas = _Deltas(flat(shapes), slot_finder(rows))
    for layer, arrays in layers.items():
        scale = 1.0
        if pair := _pair(layer, arrays, plan, problems):
            scale = _scale(layer, len(pair[0]), arrays.get("alpha"), settings)
            factors.add(layer, *pair, scale)
        weight = f"{layer}.weight" if f"{layer}.weight" in plan else layer
        for kind, key, times in (
            ("diff", weight, 1.0),
            ("diff_b", f"{layer}.bias", 1.0),
            ("bias", f"{layer}.bias", scale),
        ):
            if kind not in arrays:
                continue
            if key not in plan or plan[key][0] != arrays[kind].shape:
                problems.append(
                    f"{layer}, {kind}: is {arrays[kind].shape} for {key} "
                    f"{plan[key][0] if key in plan else 'which is not there'}"
                )
            else:
                deltas.add(key, times * _float32(arrays[kind]))
    if problems or not layers:
        raise WeightsError(
            listed(
                f"{path} is not a LoRA of the {part} of this model:",
                problems or ["it holds nothing for it"],
            )
        )
    return WeightDelta(factors.stacked(), deltas.arrays)


def write_lora(
    path: str | Path,
    factors: Params,
    model: Denoiser,
    scale: float = 1.0,
    layout: str = "diffusers",
    part: str = "transformer",
) -> None:
    """A file of these factors, in a row of LAYOUTS. `scale` is multiplied into B, so that every
    reader agrees, whatever it makes of an alpha. Raises ConfigError, or WeightsError for factors
    of layers that the layout cannot name."""
    name = lookup(layout, LAYOUTS, "layout")
    rows = wan_transformer_rows(model)
    shapes = jax.eval_shape(model.new_params, jax.random.key(0))
    mine = adapter_rows(rows, export_plan(shapes, rows))
    scaled = unflatten_dict(
        {
            key: np.asarray(value) * np.float32(scale if key.endswith(B) else 1)
            for key, value in flat(factors).items()
        },
        sep="/",
    )

    def key(known: str) -> str:
        layer, _, leaf = known.partition(".lora_")
        return f"{name(layer, part)}.lora_{leaf}"

    write(
        path,
        {key(k): planned for k, planned in export_plan(scaled, mine).items()},
        ((key(k), value) for k, value in export(scaled, mine)),
    )


def _open(path: Path, part: str) -> tuple[dict[str, StoredArray], dict[str, Any]]:
    """The arrays, and peft's settings of the part where the file, or one beside it, has them."""
    source = open_weights(path)
    beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
    settings: dict[str, Any] = {}
    if beside.is_file() and any(key.startswith("base_model.") for key in source):
        settings = read_json(beside)
    for file in {stored.file for stored in source.values() if stored.file.suffix == SAFETENSORS}:
        noted = json.loads(read_file(file)[1].get(SETTINGS, "{}"))
        settings |= {
            key.removeprefix(f"{part}."): value
            for key, value in noted.items()
            if key.startswith(f"{part}.")
        }
    if settings.get("use_dora"):
        raise WeightsError(
            f"{path} is a DoRA, which also rescales the columns of the weights; vdx has only LoRA."
        )
    return source, settings


def _by_layer(
    source: Mapping[str, StoredArray], plan: Mapping[str, Any], part: str, problems: list[str]
) -> dict[str, dict[str, StoredArray]]:
    """{layer of diffusers: {"A", "B", "bias", "alpha", "diff" or "diff_b": array}}."""
    known = {key.removesuffix(".weight").removesuffix(".bias") for key in plan}
    names = {
        name: layer
        for layer in known
        for dotted in (layer, original_name(layer))
        for name in (dotted, dotted.replace(".", "_"))
    }
    out: dict[str, dict[str, StoredArray]] = defaultdict(dict)
    for key, stored in source.items():
        whole = PART.match(key)
        assert whole, key  # it matches anything
        if whole["part"] not in (None, part):
            continue
        leaf = LEAF.match(whole["rest"])
        if leaf is None or leaf["layer"] not in names:
            problems.append(f"{key}: {'no such layer in this model' if leaf else 'unknown kind'}")
            continue
        kind = leaf["other"] or ("bias" if leaf["of"] == "bias" else HALVES[leaf["half"]])
        if kind in out[names[leaf["layer"]]]:
            problems.append(f"{key}: a second {kind} for {names[leaf['layer']]}")
        out[names[leaf["layer"]]][kind] = stored
    return out


def _pair(
    layer: str, arrays: Mapping[str, StoredArray], plan: Mapping[str, Any], problems: list[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """float32 (A [r in ...], B [out r ...]) of a layer, if it has them and they fit."""
    found = arrays.keys() & {"A", "B", "alpha", "bias"}
    if not found:
        return None
    if not {"A", "B"} <= found:
        problems.append(f"{layer}: has {', '.join(sorted(found))} without its partners")
        return None
    weight, (a, b) = plan.get(f"{layer}.weight", ((),))[0], (arrays[k].shape for k in "AB")
    fits = (
        len(weight) > 1
        and a[1:] == weight[1:]
        and b[:1] == weight[:1]
        and (b[1:] == (a[0], *[1] * (len(weight) - 2)))
    )
    if not fits:
        problems.append(f"{layer}: lora_A is {a} and lora_B {b} for a weight {weight}")
        return None
    return _float32(arrays["A"]), _float32(arrays["B"])


def _float32(stored: StoredArray) -> np.ndarray:
    return np.asarray(stored.read(), np.float32)


def _scale(layer: str, rank: int, alpha: StoredArray | None, settings: Mapping[str, Any]) -> float:
    """Of a layer's product B A. A file's own alpha goes before peft's settings."""
    if alpha is not None:
        return float(_float32(alpha).reshape(())) / rank
    if settings.get("lora_alpha") is None:
        return 1.0
    value = next(
        (
            v
            for pattern, v in (settings.get("alpha_pattern") or {}).items()
            if re.fullmatch(rf"(.*\.)?({pattern})", layer)
        ),
        settings["lora_alpha"],
    )
    return value / (math.sqrt(rank) if settings.get("use_rslora") else rank)


class _Factors:
    """Factors of layers one by one -> stacked ones. A layer without is zero, as is the rest of
    one of a smaller rank."""

    def __init__(self, leaves: Mapping[str, Any], place: Callable):
        self.leaves, self.place = leaves, place
        self.found: dict[str, dict[int | None, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)

    def add(self, layer: str, a: np.ndarray, b: np.ndarray, scale: float) -> None:
        to_a, to_b = (self.place(f"{layer}.lora_{half}.weight") for half in "AB")
        self.found[to_a.path.removesuffix(f"/{A}")][to_a.index] = (
            to_a.layout.ours(a),
            scale * to_b.layout.ours(b),
        )

    def stacked(self) -> Params:
        out = {}
        for path, parts in self.found.items():
            *layers, fan_in, fan_out = self.leaves[f"{path}/kernel"].shape
            rank = max(len(b) for _, b in parts.values())
            a = np.zeros((*layers, fan_in, rank), np.float32)
            b = np.zeros((*layers, rank, fan_out), np.float32)
            for index, (one, other) in parts.items():
                at = () if index is None else (index,)
                a[at][:, : len(other)], b[at][: len(other)] = one, other
            out[f"{path}/{A}"], out[f"{path}/{B}"] = a, b
        return unflatten_dict(out, sep="/")


class _Deltas:
    """Whole differences of parameters; `arrays`: path -> array of the whole stack."""

    def __init__(self, leaves: Mapping[str, Any], place: Callable):
        self.leaves, self.place = leaves, place
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, key: str, value: np.ndarray) -> None:
        to = self.place(key)
        whole = self.arrays.setdefault(to.path, np.zeros(self.leaves[to.path].shape, np.float32))
        whole[() if to.index is None else to.index] += to.layout.ours(value)
