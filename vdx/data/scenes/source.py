"""Procedural captioned scenes as a data source."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from vdx.config.build import ConfigError, nearest
from vdx.data.record import Record
from vdx.data.scenes.captions import describe
from vdx.data.scenes.sampling import (
    SPLITS,
    Vocabulary,
    combinations,
    sample_scene,
    surroundings,
)
from vdx.data.scenes.signals import tracks
from vdx.data.scenes.world import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    COMMANDED,
    MOTIONS,
    SHAPES,
    SIZES,
    STAY,
    STYLES,
    Scene,
)

__all__ = ["Scenes"]

# The words that each field of Scenes may contain.
WORDS: dict[str, Iterable[str]] = {
    "shapes": SHAPES,
    "colours": COLOURS,
    "motions": (*MOTIONS, COMMANDED),
    "styles": STYLES,
    "backgrounds": BACKGROUNDS,
    "cameras": CAMERAS,
    "sizes": SIZES,
}


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A source of procedural captioned clips.

    Clip i is a function of (seed, split, i) and the vocabulary.
    Raises ConfigError for an unknown word and for a selection that is empty.
    """

    height: int = 32  # pixels
    width: int = 32  # pixels
    seed: int = 0  # scene i is a function of (seed, split, i) alone
    size: int = 1_000_000  # clips
    # "train" never shows a (colour, shape, motion) of "validation"; "all" shows both.
    split: str = "train"
    shapes: tuple[str, ...] = SHAPES  # of objects
    colours: tuple[str, ...] = tuple(COLOURS)  # of objects
    motions: tuple[str, ...] = MOTIONS  # of objects
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)  # plain or patterned
    cameras: tuple[str, ...] = tuple(CAMERAS)  # pans need a patterned background
    styles: tuple[str, ...] = STYLES  # of the drawing of objects
    sizes: tuple[str, ...] = tuple(SIZES)  # of objects
    max_objects: int = 2  # 1 or 2; with 2, half of the scenes have two
    duration: float = STAY  # seconds of a clip
    one_shape: ClassVar[bool] = True  # all clips have one size and one duration

    def __post_init__(self) -> None:
        """Raise ConfigError for fields that do not fit together."""
        for field, known in WORDS.items():
            _check_words(field, getattr(self, field), known)
        self._check_numbers()
        self._check_selection()

    def _check_numbers(self) -> None:
        """Raise ConfigError for an unknown split or a number out of range."""
        if self.split not in SPLITS:
            raise ConfigError(f"Scenes.split is {self.split!r}. Known: {', '.join(SPLITS)}.")
        if self.max_objects not in (1, 2):
            raise ConfigError(f"Scenes.max_objects is {self.max_objects}, expected 1 or 2.")
        if min(self.height, self.width, self.size) < 1 or self.seed < 0 or self.duration <= 0:
            raise ConfigError(
                "Scenes.height, width, size and duration must be positive, seed "
                f"not negative: {self}."
            )

    def _check_selection(self) -> None:
        """Raise ConfigError if the chosen words leave nothing to draw."""
        chosen = combinations(self.shapes, self.colours, self.motions, self.split)
        if not chosen:
            raise ConfigError(
                f"Scenes: no {self.split!r} combination of {self.colours}, "
                f"{self.shapes} and {self.motions}. Choose more words, split "
                "'all', or for 'turn' a shape that is not round."
            )
        if self.max_objects > len({combination.colour for combination in chosen}):
            raise ConfigError(
                "Scenes.max_objects is 2: two objects need two colours, and the "
                f"{self.split!r} combinations have only {chosen[0].colour!r}."
            )
        if not surroundings(self.backgrounds, self.cameras):
            raise ConfigError(
                f"Scenes: a pan needs a patterned background, and {self.backgrounds}"
                " are plain. Add stripes, dots or checks, or camera 'static'."
            )

    def scene(self, index: int) -> Scene:
        """Return scene `index`, the same in every process.

        Raises IndexError outside [0, size).
        """
        if not 0 <= index < self.size:
            raise IndexError(f"Scenes has clips 0 to {self.size - 1}, not {index}.")
        # Counter-based, so that any clip is drawn without the ones before it.
        key = ((4 * self.seed + SPLITS.index(self.split)) << 64) + index
        rng = np.random.Generator(np.random.Philox(key=key))

        # The scene first, then its caption, from one stream of random numbers.
        vocabulary = Vocabulary(
            combinations=combinations(self.shapes, self.colours, self.motions, self.split),
            surroundings=surroundings(self.backgrounds, self.cameras),
            styles=self.styles,
            sizes=self.sizes,
            max_objects=self.max_objects,
            duration=self.duration,
        )

        scene = sample_scene(vocabulary, rng)
        return dataclasses.replace(scene, caption=describe(scene, rng))

    def __len__(self) -> int:
        """Return the number of clips."""
        return self.size

    def __getitem__(self, index: int) -> Record:
        """Return clip `index`, whose frames and tracks can be read at any instant."""
        scene = self.scene(index)
        return Record(
            key=f"scenes/{self.split}/{self.seed}/{index}",
            caption=scene.caption,
            duration=self.duration,
            timestamps=None,
            read=functools.partial(scene.render, height=self.height, width=self.width),
            attributes=scene.attributes,
            tracks=tracks(scene, self.height, self.width),
        )


def _check_words(field: str, chosen: tuple[str, ...], known: Iterable[str]) -> None:
    """Raise ConfigError if a field of Scenes is empty or contains an unknown word."""
    for word in chosen:
        if word not in known:
            raise ConfigError(
                f"Scenes.{field}: unknown word {word!r}."
                f"{nearest(word, known)} Known: {', '.join(known)}."
            )
    if not chosen:
        raise ConfigError(f"Scenes.{field} is empty. Known: {', '.join(known)}.")
