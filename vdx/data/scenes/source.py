"""Procedural captioned scenes as a data source."""

import dataclasses
import functools

import numpy as np

from vdx.config.build import ConfigError, nearest
from vdx.data.record import Record
from vdx.data.scenes.captions import describe
from vdx.data.scenes.sampling import _gap, _place, _settings, _triples
from vdx.data.scenes.signals import tracks
from vdx.data.scenes.world import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SHARED,
    SIZES,
    STAY,
    STEERED,
    STYLES,
    Scene,
)

__all__ = ["Scenes"]


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A source of `size` procedural clips; clip i depends on (seed, split, i) and the vocabulary.

    split: "train" never shows a held-out (colour, shape, motion), "validation" shows only those,
    "all" shows both. shapes ... sizes restrict the vocabulary. duration: seconds of a clip.
    Raises ConfigError for an unknown word and for a selection that is empty.
    """

    height: int = 32
    width: int = 32
    seed: int = 0
    size: int = 1_000_000
    split: str = "train"
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    motions: tuple[str, ...] = MOTIONS
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    cameras: tuple[str, ...] = tuple(CAMERAS)
    styles: tuple[str, ...] = STYLES
    sizes: tuple[str, ...] = tuple(SIZES)
    max_objects: int = 2
    duration: float = STAY

    def __post_init__(self):
        known = {
            "shapes": SHAPES,
            "colours": COLOURS,
            "motions": (*MOTIONS, STEERED),
            "styles": STYLES,
            "backgrounds": BACKGROUNDS,
            "cameras": CAMERAS,
            "sizes": SIZES,
        }
        for field, words in known.items():
            chosen = getattr(self, field)
            for word in chosen:
                if word not in words:
                    raise ConfigError(
                        f"Scenes.{field}: unknown word {word!r}."
                        f"{nearest(word, words)} Known: {', '.join(words)}."
                    )
            if not chosen:
                raise ConfigError(f"Scenes.{field} is empty. Known: {', '.join(words)}.")
        if self.split not in ("train", "validation", "all"):
            raise ConfigError(f"Scenes.split is {self.split!r}. Known: train, validation, all.")
        if self.max_objects not in (1, 2):
            raise ConfigError(f"Scenes.max_objects is {self.max_objects}, expected 1 or 2.")
        if min(self.height, self.width, self.size) < 1 or self.seed < 0 or self.duration <= 0:
            raise ConfigError(
                "Scenes.height, width, size and duration must be positive, seed "
                f"not negative: {self}."
            )
        triples = _triples(self.shapes, self.colours, self.motions, self.split)
        if not triples:
            raise ConfigError(
                f"Scenes: no {self.split!r} combination of {self.colours}, "
                f"{self.shapes} and {self.motions}. Choose more words, split "
                "'all', or for 'turn' a shape that is not round."
            )
        if self.max_objects > len({colour for colour, _, _ in triples}):
            raise ConfigError(
                "Scenes.max_objects is 2: two objects need two colours, and the "
                f"{self.split!r} combinations have only {triples[0][0]!r}."
            )
        if not _settings(self.backgrounds, self.cameras):
            raise ConfigError(
                f"Scenes: a pan needs a patterned background, and {self.backgrounds}"
                " are plain. Add stripes, dots or checks, or camera 'static'."
            )

    def scene(self, index: int) -> Scene:
        """Scene `index`, the same in every process. Raises IndexError outside [0, size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"Scenes has clips 0 to {self.size - 1}, not {index}.")
        split = ("train", "validation", "all").index(self.split)
        # Counter-based, so that any clip is drawn without the ones before it.
        rng = np.random.Generator(np.random.Philox(key=((4 * self.seed + split) << 64) + index))
        settings = _settings(self.backgrounds, self.cameras)
        place, camera = settings[int(rng.random() * len(settings))]
        style = self.styles[int(rng.random() * len(self.styles))]
        triples = _triples(self.shapes, self.colours, self.motions, self.split)
        words = [triples[int(rng.random() * len(triples))]]
        if self.max_objects > 1 and rng.random() < 0.5:
            others = [t for t in triples if t[0] != words[0][0]]
            words.append(others[int(rng.random() * len(others))])
        # Of a few arrangements of two objects the one with the most room between them.
        scale = SHARED if words[1:] else 1.0
        tries = [
            [_place(w, camera, self.sizes, scale, self.duration, rng) for w in words]
            for _ in range(8 if words[1:] else 1)
        ]
        objects = max(tries, key=_gap)
        bare = Scene(tuple(objects), place, camera, style)
        return dataclasses.replace(bare, caption=describe(bare, rng))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        read = functools.partial(scene.render, height=self.height, width=self.width)
        return Record(
            f"scenes/{self.split}/{self.seed}/{index}",
            scene.caption,
            self.duration,
            None,
            read,
            scene.attributes,
            tracks(scene, self.height, self.width),
        )
