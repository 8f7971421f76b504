"""The model card of an export: what the weights are, and how to use them."""

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import vdx
from vdx.config.build import ConfigError
from vdx.data.pipeline import DataError
from vdx.experiment import Experiment
from vdx.files import atomic_write

__all__ = ["DataSummary", "Places", "describe_data", "file_metadata", "write_card"]

# Sections of a config that say how the weights were trained; none has a path of this machine.
SECTIONS = ("model", "lora", "process", "time_sampler", "loss", "first_frame", "optim", "sample")
CARD = Template("""# $name

$what for **$base**, trained with vdx $version.

| | |
|---|---|
$facts

## Use

$use
$clips
## Config

```json
$config
```
""")
USE_LORA = Template("""vdx:

```bash
python -m vdx.sample --weights=$base --lora=$file --prompt="..." --out=clip.mp4
```

diffusers:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("$base")
pipe.load_lora_weights("$file")
```
""")
USE_COMFYUI = Template("""
ComfyUI: put `$file` into `models/loras`, and the node `LoraLoaderModelOnly` behind the one that
loads the model, with a strength of 1.
""")
USE_NETWORK = Template("""diffusers:

```python
from diffusers import DiffusionPipeline, WanTransformer3DModel

transformer = WanTransformer3DModel.from_pretrained("$file")
pipe = DiffusionPipeline.from_pretrained("$base", transformer=transformer)
```

vdx: put the folder in place of `$base/transformer`, then

```bash
python -m vdx.sample --weights=$base --prompt="..." --out=clip.mp4
```

ComfyUI: put the `.safetensors` file into `models/diffusion_models`.
""")


class Places(NamedTuple):
    """The places of an export."""

    weights: Path  # a file of adapters, or the folder of a network
    card: Path  # the model card, a Markdown file
    clips: Path  # the folder of sample clips


class DataSummary(NamedTuple):
    """The data of a run, as its model card describes them."""

    text: str
    trigger_word: str | None  # the word in every caption that calls what was learned


def describe_data(experiment: Experiment) -> DataSummary:
    """Summarise the training data of a run, which may be elsewhere."""
    name = Path(str(experiment.data.source.get("path") or experiment.data.source["name"])).name
    try:
        source = experiment.source()
    except (ConfigError, DataError, OSError):
        return DataSummary(f"{name}; not at hand when this page was written", None)
    metadata = getattr(source, "metadata", {})
    text = f"{name}: {len(source):,} training clips"
    if metadata.get("latents"):
        text += f", latents [t h w c] = {list(metadata['latents'])}"
    return DataSummary(text, metadata.get("trigger_word"))


def base_name(experiment: Experiment) -> str:
    """Return the name of the pretrained model that a run started from."""
    weights = experiment.weights.path
    if not isinstance(weights, str):
        return "new weights"
    path = Path(weights).resolve()
    if path.suffix and path.parent.name == "transformer":
        path = path.parent
    if path.name == "transformer":
        path = path.parent
    return path.name


def file_metadata(experiment: Experiment, step: int, data: DataSummary) -> dict[str, str]:
    """Return the texts in the header of a file of adapters.

    There is no alpha: the scale is multiplied in, and a reader that finds one would scale again.
    """
    assert experiment.lora is not None
    facts = {
        "software": f"vdx {vdx.__version__}",
        "base_model": base_name(experiment),
        "rank": str(experiment.lora.rank),
        "steps": str(step),
    }
    if data.trigger_word:
        facts["trigger_word"] = data.trigger_word
    return facts


def write_card(
    experiment: Experiment,
    places: Places,
    step: int,
    layout: str,
    data: DataSummary,
    prompts: Sequence[str],
) -> None:
    """Write the model card. prompts: those of the sample clips."""
    base = base_name(experiment)
    facts = {
        "base weights": base,
        "steps": f"{step:,} of {experiment.training.steps:,}; averaged weights",
        "clips a step": f"{experiment.loader.global_batch}",
        "data": data.text,
    }
    what = "All weights of a network"
    use = USE_NETWORK
    if experiment.lora is not None:
        what = "Low-rank adapters (LoRA)"
        use = USE_LORA
        scale = f"alpha / rank = {experiment.lora.scale:g} is multiplied in: strength 1"
        facts |= {"rank": str(experiment.lora.rank), "scale": scale, "layout": layout}
        if layout == "comfyui":
            use = Template(USE_LORA.template + USE_COMFYUI.template)
    if data.trigger_word:
        facts["trigger word"] = f"`{data.trigger_word}`, a part of every prompt"

    text = CARD.substitute(
        name=places.weights.stem,
        what=what,
        base=base,
        version=vdx.__version__,
        facts="\n".join(f"| {_cell(name)} | {_cell(fact)} |" for name, fact in facts.items()),
        use=use.substitute(base=base, file=places.weights.name),
        clips=_clips(places, prompts),
        config=json.dumps(
            {name: experiment.config[name] for name in SECTIONS if name in experiment.config},
            indent=2,
            ensure_ascii=False,
        ),
    )
    with atomic_write(places.card) as part:
        part.write_text(text, encoding="utf-8")


def _clips(places: Places, prompts: Sequence[str]) -> str:
    """Return the section of the sample clips; empty without any."""
    if not prompts:
        return ""
    rows = [
        f"| [{places.clips.name}/{i:03d}.mp4]({places.clips.name}/{i:03d}.mp4) | {_cell(prompt)} |"
        for i, prompt in enumerate(prompts)
    ]
    return "\n".join(["\n## Sample clips", "", "| clip | prompt |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    """Return text as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
