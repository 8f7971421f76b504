"""LoRA files for Wan transformers: four layouts are read, two are written.

    diffusers   transformer[_2].blocks.0.attn1.to_q.lora_{A,B}.weight, `lora_adapter_metadata`
    peft        base_model.model.blocks.0.attn1.to_q.lora_{A,B}.weight, adapter_config.json
    ComfyUI     diffusion_model.blocks.0.self_attn.q.lora_{A,B | down,up}.weight
    kohya       lora_unet_blocks_0_self_attn_q.lora_{down,up}.weight

The first two and the last two differ in how they name layers; any prefix is accepted with any
names, and dots in them may be underscores. `.alpha` scales by alpha / rank. Without it, or an alpha
in the metadata, the scale is 1. `.diff`, `.diff_b`, `.diff_m` and `.lora_B.bias` are whole
differences of a weight, a bias, a table of modulation, and a bias. Layers' names and the order of
their channels come from the rows of vdx.interop.wan_keys, as those of the weights do.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from vdx.config.build import check_entries, lookup
from vdx.config.ranges import Positive
from vdx.files import parse_json
from vdx.interop.config_ranges import read_config
from vdx.interop.keymap import (
    LINEAR,
    Layout,
    Row,
    WeightsError,
    export,
    flat,
    listed,
    slot_finder,
)
from vdx.interop.load import open_weights
from vdx.interop.lora_stacks import DeltaStacker, FactorPair, FactorStacker
from vdx.interop.safetensors import read_file, write
from vdx.interop.save import export_plan
from vdx.interop.stored_array import StoredArray, read_finite
from vdx.interop.wan_keys import original_name, wan_transformer_rows
from vdx.models.adapters.lora import A, B, WeightDelta
from vdx.models.denoiser import Denoiser
from vdx.models.shapes import new_shapes
from vdx.types import Params

__all__ = ["LAYOUTS", "open_lora", "write_lora"]

# A key: which network of a file it is of, then the rest.
PART = re.compile(
    r"^(?:base_model\.model\.)?(?:(?P<part>transformer(?:_2)?)\.|"
    r"(?:model\.)?diffusion_model\.|lora_unet[_.])?(?P<rest>.*)$"
)
# The rest: a layer, then what is stored for it.
LEAF = re.compile(
    r"^(?P<layer>.+?)\.(?:lora_(?P<half>A|B|down|up)(?:\.\w+)?\.(?P<of>weight|bias)"
    r"|(?P<other>alpha|diff|diff_b|diff_m))$"
)
HALVES = {"A": "A", "down": "A", "B": "B", "up": "B"}
# Of peft's settings, those that are read.
SETTINGS = {
    "lora_alpha": Positive | None,
    "alpha_pattern": dict[str, Positive] | None,
    "use_rslora": bool | None,
    "use_dora": bool | None,
}
METADATA = "lora_adapter_metadata"  # peft's settings in a file's header
# Layouts that are written: (layer of diffusers, part) -> the layer's name.
LAYOUTS: dict[str, Callable[[str, str], str]] = {
    "diffusers": lambda layer, part: f"{part}.{layer}",
    "comfyui": lambda layer, part: f"diffusion_model.{original_name(layer)}",
}


def adapter_rows(rows: Sequence[Row], plan: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the factors of every kernel that `rows` name.

    plan: export_plan of the weights. A weight is B A, and its layout moves its inputs, which are
    A's, or its outputs, which are B's: A is transposed, and B is laid out like the weight. Of a
    convolution it is A that has the kernel's extent.
    """
    factors = []
    for row in rows:
        if row.path is None or not row.source.endswith(".weight") or "/kernel" not in row.path:
            continue

        layer = row.source.removesuffix(".weight")
        shape = plan[row.source][0]
        extent = len(shape) - 2  # axes of a convolution's kernel

        # The layout of the weight is that of its outputs, or of a convolution's inputs.
        if extent:
            layouts = {"A": row.layout, "B": _outputs(extent)}
        else:
            layouts = {"A": LINEAR, "B": row.layout}

        for half, leaf in (("A", A), ("B", B)):
            path = row.path.replace("kernel", leaf)
            factors.append(Row(f"{layer}.lora_{half}.weight", path, layouts[half]))
    return factors


def _outputs(extent: int) -> Layout:
    """Return the layout of a convolution's B: [out r 1 ...] there, [r out] here."""
    ones = [1] * extent
    return Layout(
        lambda x: x.reshape(x.shape[:2]).T,
        lambda x: x.T.reshape(*x.shape[::-1], *ones),
    )


# Reading


def open_lora(path: str | Path, model: Denoiser, part: str = "transformer") -> WeightDelta:
    """Read the changes of a LoRA file, or of a folder that holds one, to a Wan model.

    They are float32 arrays on the host, with every scale multiplied in, for
    vdx.models.adapters.lora.adapt. part: of a file for both experts of Wan 2.2 A14B,
    "transformer" (high noise) or "transformer_2"; a file that names the first one alone is of
    either. Raises WeightsError that lists every key and shape that is not of this model, or names
    an array that holds NaN or infinity.
    """
    # The names and shapes of the model's weights in diffusers.
    shapes = new_shapes(model)
    rows = wan_transformer_rows(model)
    plan = export_plan(shapes, rows)
    source = open_weights(path)
    name = _name_in_file(source, part)
    settings = _read_settings(Path(path), source, name)

    problems: list[str] = []
    layers = _by_layer(source, plan, name, problems)
    factors = FactorStacker(flat(shapes), slot_finder(adapter_rows(rows, plan)))
    deltas = DeltaStacker(flat(shapes), slot_finder(rows))

    for layer, arrays in layers.items():
        scale = 1.0
        pair = _read_pair(layer, arrays, plan, problems)
        if pair is not None:
            scale = _scale(layer, pair.rank, arrays.get("alpha"), settings)
            factors.add(layer, pair, scale)
        for key, delta in _read_deltas(layer, arrays, plan, scale, problems).items():
            deltas.add(key, delta)

    # Raise once, with everything that is wrong.
    if not layers and not problems:
        problems.append("it holds nothing for it")
    if problems:
        head = f"{path} is not a LoRA of the {part} of this model:"
        raise WeightsError(listed(head, problems))
    return WeightDelta(factors.stacked(), deltas.arrays)


def _name_in_file(source: Mapping[str, StoredArray], part: str) -> str:
    """Return the name that keys of a file have for the layers of `part`.

    Trainers of a single expert save the second one under the name of the first.
    """
    matches = [PART.match(key) for key in source]
    names = {match["part"] for match in matches if match}
    return part if part in names else "transformer"


def _read_settings(path: Path, source: Mapping[str, StoredArray], name: str) -> dict[str, Any]:
    """Return peft's settings of the part that a file calls `name`.

    They are in the file's header, or in a file in the same folder. Raises WeightsError for a DoRA.
    """
    settings: dict[str, Any] = {}

    # peft's own file.
    folder = path if path.is_dir() else path.parent
    settings_file = folder / "adapter_config.json"
    if settings_file.is_file() and any(key.startswith("base_model.") for key in source):
        settings = read_config(settings_file, SETTINGS)

    # The headers that diffusers writes.
    files = {stored.file for stored in source.values() if stored.file.suffix == ".safetensors"}
    prefix = f"{name}."
    for file in files:
        metadata = read_file(file).metadata
        stored = parse_json(metadata.get(METADATA, "{}"), f"{METADATA} in {file}")
        if not isinstance(stored, dict):
            raise WeightsError(f"{METADATA} in {file} is no object.")
        for key, value in stored.items():
            if key.startswith(prefix):
                settings[key.removeprefix(prefix)] = value
        check_entries(settings, SETTINGS, f"{METADATA} in {file}")

    if settings.get("use_dora"):
        raise WeightsError(
            f"{path} is a DoRA, which also rescales the columns of the weights; vdx has only LoRA."
        )
    return settings


def _by_layer(
    source: Mapping[str, StoredArray], plan: Mapping[str, Any], name: str, problems: list[str]
) -> dict[str, dict[str, "_Entry"]]:
    """Return {layer of diffusers: {kind: entry}} of one part of a file.

    name: of the part, in the file. Kinds are A, B, bias, alpha, diff and diff_b. Keys
    that are of no layer of this model, or come twice, are added to `problems`.
    """
    names = _layer_names(plan)
    layers: dict[str, dict[str, _Entry]] = defaultdict(dict)
    for key, stored in source.items():
        # Skip the other expert.
        whole = PART.match(key)
        assert whole, key  # it matches anything
        if whole["part"] not in (None, name):
            continue

        # Find the kind. A difference of the modulation is one of its table.
        leaf = LEAF.match(whole["rest"])
        if leaf is None:
            problems.append(f"{key}: unknown kind")
            continue
        named = leaf["layer"]
        kind = leaf["other"]
        if kind is None:
            kind = HALVES[leaf["half"]]
            if leaf["of"] == "bias":
                kind = "bias"
        if kind == "diff_m":
            named = f"{named}.modulation"
            kind = "diff"

        # Find the layer.
        layer = names.get(_undotted(named))
        if layer is None:
            problems.append(f"{key}: no such layer in this model")
            continue
        if kind in layers[layer]:
            problems.append(f"{key}: a second {kind} for {layer}")
        layers[layer][kind] = _Entry(key, stored)
    return layers


class _Entry(NamedTuple):
    """An array of the file."""

    key: str
    stored: StoredArray

    def read(self) -> np.ndarray:
        """Return the array in float32. Raises WeightsError if it is not finite."""
        return np.asarray(read_finite(self.key, self.stored), np.float32)


def _undotted(layer: str) -> str:
    return layer.replace(".", "_")


def _layer_names(plan: Mapping[str, Any]) -> dict[str, str]:
    """Return {name of a layer in any layout, without dots: in diffusers}."""
    layers = {key.removesuffix(".weight").removesuffix(".bias") for key in plan}
    theirs = {_undotted(original_name(layer)): layer for layer in layers}
    return theirs | {_undotted(layer): layer for layer in layers}


def _read_pair(
    layer: str, arrays: Mapping[str, _Entry], plan: Mapping[str, Any], problems: list[str]
) -> FactorPair | None:
    """Read the factors of a layer, if it has some; those that do not fit are problems."""
    found = arrays.keys() & {"A", "B", "alpha", "bias"}
    if not found:
        return None
    if not {"A", "B"} <= found:
        problems.append(f"{layer}: has {', '.join(sorted(found))} without its partners")
        return None

    weight: tuple[int, ...] = ()
    if f"{layer}.weight" in plan:
        weight = plan[f"{layer}.weight"][0]
    a = arrays["A"].stored.shape
    b = arrays["B"].stored.shape
    ones = (1,) * (len(weight) - 2)  # a convolution's extent is in A
    fits = len(weight) > 1 and a[1:] == weight[1:] and b == (weight[0], a[0], *ones)
    if not fits:
        problems.append(f"{layer}: lora_A is {a} and lora_B {b} for a weight {weight}")
        return None
    return FactorPair(arrays["A"].read(), arrays["B"].read())


def _read_deltas(
    layer: str,
    arrays: Mapping[str, _Entry],
    plan: Mapping[str, Any],
    scale: float,
    problems: list[str],
) -> dict[str, np.ndarray]:
    """Return {key of diffusers: whole difference} of a layer; misfits are problems."""
    # Tables are keys without `.weight`.
    weight = f"{layer}.weight" if f"{layer}.weight" in plan else layer
    bias = f"{layer}.bias"
    deltas: dict[str, np.ndarray] = {}

    for kind, key, times in (("diff", weight, 1.0), ("diff_b", bias, 1.0), ("bias", bias, scale)):
        if kind not in arrays:
            continue

        shape = arrays[kind].stored.shape
        if key not in plan:
            problems.append(f"{layer}, {kind}: is {shape} for {key} which is not there")
        elif plan[key][0] != shape:
            problems.append(f"{layer}, {kind}: is {shape} for {key} {plan[key][0]}")
        else:
            delta = times * arrays[kind].read()
            deltas[key] = deltas[key] + delta if key in deltas else delta
    return deltas


def _scale(layer: str, rank: int, alpha: _Entry | None, settings: Mapping[str, Any]) -> float:
    """Return the scale of a layer's product B A.

    The file's own alpha takes precedence over peft's settings.
    """
    if alpha is not None:
        return float(alpha.read().reshape(())) / rank
    value = settings.get("lora_alpha")
    if value is None:
        return 1.0

    # The first pattern that matches the layer goes before the setting for all.
    for pattern, special in (settings.get("alpha_pattern") or {}).items():
        if _matches(pattern, layer):
            value = special
            break
    if settings.get("use_rslora"):
        return value / math.sqrt(rank)
    return value / rank


def _matches(pattern: str, layer: str) -> bool:
    """Return whether a regex of peft's settings is of a layer."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None
    except re.error as error:
        raise WeightsError(f"alpha_pattern: {pattern!r:.200} is no regex: {error}.") from error


# Writing


def write_lora(
    path: str | Path,
    factors: Params,
    model: Denoiser,
    scale: float = 1.0,
    layout: str = "diffusers",
    part: str = "transformer",
) -> None:
    """Write a file of these factors. layout: a row of LAYOUTS.

    `scale` is multiplied into B, so that all readers agree, however they treat an alpha. Raises
    ConfigError for an unknown layout, WeightsError for factors of layers that it cannot name.
    """
    # The rows of the factors.
    layer_name = lookup(layout, LAYOUTS, "layout")
    weight_rows = wan_transformer_rows(model)
    shapes = new_shapes(model)
    rows = adapter_rows(weight_rows, export_plan(shapes, weight_rows))

    # Multiply the scale into B.
    scaled = {}
    for key, value in flat(factors).items():
        times = np.float32(1)  # factors of any type are written as float32
        if key.endswith(B):
            times = np.float32(scale)
        scaled[key] = np.asarray(value) * times
    tree = unflatten_dict(scaled, sep="/")

    def rename(key: str) -> str:
        layer, _, leaf = key.partition(".lora_")
        return f"{layer_name(layer, part)}.lora_{leaf}"

    # Write under the layout's names.
    plan = {rename(key): planned for key, planned in export_plan(tree, rows).items()}
    write(path, plan, ((rename(key), value) for key, value in export(tree, rows)))
