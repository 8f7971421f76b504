"""Keys of configs that have a new name, so that an older config gets an answer.

Configs, the `config.json` of a workdir and command lines may all hold a key of before. None is
accepted in silence and none is translated: the error names the new key, and the file is mended.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vdx.config.build import ConfigError

__all__ = ["RENAMED_KEYS", "check_renamed_keys", "renamed"]

# Old dotted key -> new dotted key, both below `config`. A key stands for all that is below it.
RENAMED_KEYS: dict[str, str] = {
    "data.heldout": "data.validation",
    "data.source.heldout": "data.source.validation_fraction",
    "forcing": "diffusion_forcing",
    "judge.prompts": "eval.prompt_following.prompts",
    "judge.steering": "eval.control.clips",
    "loss.gamma": "loss.denoising.weighting.gamma",
    "loss.min_sigma": "loss.denoising.weighting.min_sigma",
    "loss.name": "loss.denoising.weighting.name",
    "optim.accumulate": "optim.grad_accum_steps",
    "optim.clip": "optim.max_grad_norm",
    "optim.method": "optim.name",
    "optim.warmup": "optim.warmup_steps",
    "sample.grid": "sample.timesteps",
    "sample.guide": "sample.signal_guidance",
    "sample.interval": "sample.guidance_interval",
    "sample.rescale": "sample.guidance_rescale",
    "sample.reuse": "sample.cache_threshold",
    "time": "time_sampler",
    "train.bad_in_row": "train.max_bad_steps",
    "train.best": "train.best_metric",
    "train.bins": "train.loss_bins",
    "train.eval_clips": "eval.loss.clips",
    "train.eval_every": "eval.loss.every",
    "train.keep": "train.max_to_keep",
    "train.keep_every": "train.keep_period",
    "train.levels": "eval.loss.times",
    "train.rollbacks": "train.max_rollbacks",
    "train.spike": "train.max_grad_norm_ratio",
    "train.stuck_after": "train.watchdog_seconds",
    "train.wall": "train.sample_prompts",
}


def check_renamed_keys(
    config: Mapping[str, Any],
    table: Mapping[str, str] = RENAMED_KEYS,
    where: str = "config",
    source: str = "",
) -> None:
    """Raise ConfigError that lists every key of `config` that has a new name.

    where: the prefix of the keys in the message. source: the file that holds them, if known.
    """
    found = list(renamed(config, table))
    if not found:
        return
    lines = [f"{where}.{old} is now {where}.{new}" for old, new in found]
    origin = f" of {source}" if source else ""
    raise ConfigError("\n  ".join([f"Keys{origin} that have a new name:", *lines]))


def renamed(
    config: Mapping[str, Any], table: Mapping[str, str], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Yield (old key, new key) for the keys of a nested mapping that the table holds."""
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path in table:
            yield path, table[path]
        elif isinstance(value, Mapping):
            yield from renamed(value, table, f"{path}.")
