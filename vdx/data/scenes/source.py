"""Procedural captioned scenes as a data source."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import numpy as np

from vdx.config.build import ConfigError, check_fields
from vdx.config.ranges import Count, Interval, OneOf, Positive
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

SURVEYED = 1000  # clips whose captions are surveyed; each takes 0.2 ms


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A source of procedural captioned clips.

    Clip i is a function of (seed, split, i) and the vocabulary.
    Raises ConfigError for an unknown word and for a selection that is empty.
    """

    height: Count = 32  # pixels
    width: Count = 32  # pixels
    # Scene i is a function of (seed, split, i) alone.
    seed: Annotated[int, Interval(0, 2**62 - 1)] = 0
    size: Count = 1_000_000  # clips
    # "train" never shows a (colour, shape, motion) of "validation"; "all" shows both.
    split: Literal["train", "validation", "all"] = "train"
    shapes: tuple[Annotated[str, OneOf(lambda: SHAPES)], ...] = SHAPES  # of objects
    colours: tuple[Annotated[str, OneOf(lambda: COLOURS)], ...] = tuple(COLOURS)  # of objects
    # Of objects.
    motions: tuple[Annotated[str, OneOf(lambda: (*MOTIONS, COMMANDED))], ...] = MOTIONS
    # Plain or patterned.
    backgrounds: tuple[Annotated[str, OneOf(lambda: BACKGROUNDS)], ...] = tuple(BACKGROUNDS)
    # Pans need a patterned background.
    cameras: tuple[Annotated[str, OneOf(lambda: CAMERAS)], ...] = tuple(CAMERAS)
    styles: tuple[Annotated[str, OneOf(lambda: STYLES)], ...] = STYLES  # of the drawing of objects
    sizes: tuple[Annotated[str, OneOf(lambda: SIZES)], ...] = tuple(SIZES)  # of objects
    max_objects: Literal[1, 2] = 2  # with 2, half of the scenes have two
    duration: Positive = STAY  # seconds of a clip
    one_shape: ClassVar[bool] = True  # all clips have one size and one duration

    def __post_init__(self) -> None:
        """Raise ConfigError for fields that do not fit together."""
        check_fields(self, "config.data.source")
        for name in ("shapes", "colours", "motions", "backgrounds", "cameras", "styles", "sizes"):
            if not getattr(self, name):
                words = ", ".join(getattr(Scenes, name))
                raise ConfigError(
                    f"config.data.source.{name} is empty: give one or more words, such as {words}."
                )
        self._check_selection()

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

    def captions(self) -> Iterator[str]:
        """Yield the captions of the first clips."""
        for index in range(min(SURVEYED, self.size)):
            yield self.scene(index).caption

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
