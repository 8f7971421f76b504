"""Captions of procedural scenes: the same facts in many phrasings.

A caption always has shape, colour and motion. It has size, speed, background, camera and style
only sometimes, so that a model learns what an attribute means that a caption leaves out.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vdx.data.scenes.sampling import pick
from vdx.data.scenes.world import Object, Scene

__all__ = ["BACKGROUND_WORDS", "CAMERA_WORDS", "MOTION_WORDS", "STYLE_WORDS", "describe"]

BYTES_PER_OBJECT = 64

# (finite verb, participle): "a red circle moves right", "a red circle moving right".
MOTION_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "left": (
        ("moves left", "moving left"),
        ("slides to the left", "sliding to the left"),
        ("drifts towards the left", "drifting towards the left"),
        ("travels left", "travelling left"),
    ),
    "right": (
        ("moves right", "moving right"),
        ("slides to the right", "sliding to the right"),
        ("drifts towards the right", "drifting towards the right"),
        ("travels right", "travelling right"),
    ),
    "up": (
        ("moves up", "moving up"),
        ("rises", "rising"),
        ("floats upwards", "floating upwards"),
        ("climbs", "climbing"),
    ),
    "down": (
        ("moves down", "moving down"),
        ("sinks", "sinking"),
        ("descends", "descending"),
        ("slides downwards", "sliding downwards"),
    ),
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("expands", "expanding")),
    "shrink": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("contracts", "contracting"),
    ),
    "turn": (
        ("turns", "turning"),
        ("spins", "spinning"),
        ("rotates", "rotating"),
        ("turns clockwise", "turning clockwise"),
        ("spins in place", "spinning in place"),
    ),
    "bounce": (
        ("bounces", "bouncing"),
        ("bounces up and down", "bouncing up and down"),
        ("bounces off the floor", "bouncing off the floor"),
    ),
    "steered": (
        ("is steered", "being steered"),
        ("is steered around", "being steered around"),
        ("is driven around", "being driven around"),
    ),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
SPEED_WORDS = {"slow": ("slowly", "gently"), "fast": ("quickly", "fast")}
BACKGROUND_WORDS = {
    "black": ("on black", "on a black background", "against a black background"),
    "grey": ("on grey", "on a grey background", "against a grey background"),
    "dark blue": ("on dark blue", "on a dark blue background"),
    "brown": ("on brown", "on a brown background"),
    "stripes": ("on stripes", "on a striped background", "over stripes"),
    "dots": ("on dots", "on a dotted background", "over dots"),
    "checks": ("on checks", "on a checkered background", "over a checkerboard"),
}
CAMERA_WORDS = {
    "static": ("static camera", "the camera is still"),
    "pan left": ("camera pans left", "the camera pans left", "panning left"),
    "pan right": ("camera pans right", "the camera pans right", "panning right"),
}
STYLE_WORDS = {
    "flat": ("flat style", "flat colour"),
    "outlined": ("outlined", "drawn with an outline", "outlined style"),
    "soft": ("soft edges", "blurry edges", "soft style"),
}


class _Sentence(NamedTuple):
    """The parts of a caption; a part that is empty is left out."""

    opening: str  # "a video of "
    action: str  # "a red circle moves right and a blue star grows"
    place: str  # "on a black background"
    remarks: tuple[str, ...]  # camera and style
    place_first: bool  # the place comes before the action, where there is no opening

    def text(self) -> str:
        """Return the caption."""
        if self.place and self.place_first and not self.opening:
            main = f"{self.place}, {self.action}"
        elif self.place:
            main = f"{self.opening}{self.action} {self.place}"
        else:
            main = f"{self.opening}{self.action}"
        return ", ".join([main, *self.remarks])


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """Return one ASCII caption of a scene, at most 64 bytes for each object in it.

    Every call draws a new phrasing from `rng`; the facts are those of the scene.
    """
    sentence = _draw_sentence(scene, rng)
    limit = BYTES_PER_OBJECT * len(scene.objects)
    for shorter in _shortened(sentence):
        caption = shorter.text()
        if len(caption) <= limit:
            return caption
    raise AssertionError(f"the words of {sentence.action!r} are longer than {limit} bytes")


def _draw_sentence(scene: Scene, rng: np.random.Generator) -> _Sentence:
    """Draw the parts of a caption, some of which are left out."""
    # After an opening the verb is a participle: "a video of a red circle moving right".
    opening = ""
    if rng.random() < 0.2:
        opening = pick(("a video of ", "a clip of "), rng)
    participle = bool(opening) or rng.random() < 0.25

    actions = [f"{_noun(item, rng)} {_verb(item, rng, participle)}" for item in scene.objects]

    place = ""
    if rng.random() < 0.5:
        place = pick(BACKGROUND_WORDS[scene.background], rng)

    # A static camera and the flat style are the plain case, which captions seldom mention.
    remarks = []
    if rng.random() < (0.1 if scene.camera == "static" else 0.7):
        remarks.append(pick(CAMERA_WORDS[scene.camera], rng))
    if rng.random() < (0.1 if scene.style == "flat" else 0.5):
        remarks.append(pick(STYLE_WORDS[scene.style], rng))
    place_first = rng.random() < 0.25

    return _Sentence(opening, " and ".join(actions), place, tuple(remarks), place_first)


def _shortened(sentence: _Sentence) -> Iterator[_Sentence]:
    """Yield a sentence, then shorter ones.

    The parts that inform least are dropped first.
    """
    yield sentence
    sentence = sentence._replace(opening="")
    yield sentence
    for _ in range(2):
        sentence = sentence._replace(remarks=sentence.remarks[1:])
        yield sentence
    yield sentence._replace(place="")


def _noun(item: Object, rng: np.random.Generator) -> str:
    """Return "a small red circle", "a red circle" or "a red circle, small,"."""
    words = f"{item.colour} {item.shape}"
    after = ""
    if rng.random() < 0.4:
        size = pick(SIZE_WORDS[item.size], rng)
        if rng.random() < 0.85:
            words = f"{size} {words}"
        else:
            after = f", {size},"
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}{after}"


def _verb(item: Object, rng: np.random.Generator, participle: bool) -> str:
    """Return the motion, finite or as a participle, perhaps with its speed."""
    finite_form, participle_form = pick(MOTION_WORDS[item.motion], rng)
    verb = participle_form if participle else finite_form
    if rng.random() < 0.4:
        adverb = pick(SPEED_WORDS[item.speed], rng)
        if adverb != "fast" and rng.random() < 0.5 and not verb.startswith("is "):
            verb = f"{adverb} {verb}"
        else:
            verb = f"{verb} {adverb}"
    return verb
