"""Captions of procedural scenes: the same facts in many phrasings.

Shape, colour and motion are always said; size, speed, background, camera and style only
sometimes, so that a model trained on these captions learns what an unsaid attribute means.
"""

from collections.abc import Sequence

import numpy as np

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


def _pick(rng: np.random.Generator, options: Sequence):
    # Four times cheaper than rng.integers, and a caption needs a dozen picks.
    return options[int(rng.random() * len(options))]


def _noun(item: Object, rng: np.random.Generator) -> str:
    """ "a small red circle", "a red circle" or "a red circle, small,"."""
    words, after = f"{item.colour} {item.shape}", ""
    if rng.random() < 0.4:
        size = _pick(rng, SIZE_WORDS[item.size])
        if rng.random() < 0.85:
            words = f"{size} {words}"
        else:
            after = f", {size},"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}{after}"


def _verb(item: Object, rng: np.random.Generator, form: int) -> str:
    """The motion, form 0 finite and 1 participle, perhaps with its speed."""
    verb = _pick(rng, MOTION_WORDS[item.motion])[form]
    if rng.random() < 0.4:
        adverb = _pick(rng, SPEED_WORDS[item.speed])
        first = adverb != "fast" and rng.random() < 0.5 and not verb.startswith("is ")
        verb = f"{adverb} {verb}" if first else f"{verb} {adverb}"
    return verb


def _join(opening: str, action: str, place: str, remarks: list[str], place_first: bool) -> str:
    if place and place_first and not opening:
        action, place = f"{place}, {action}", ""
    return ", ".join([f"{opening}{action}{' ' if place else ''}{place}", *remarks])


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """One ASCII caption of a scene, at most 64 bytes for each object in it.

    Every call draws a new phrasing from `rng`; the facts are those of the scene.
    """
    opening = _pick(rng, ("a video of ", "a clip of ")) if rng.random() < 0.2 else ""
    form = 1 if opening or rng.random() < 0.25 else 0
    action = " and ".join(f"{_noun(o, rng)} {_verb(o, rng, form)}" for o in scene.objects)
    place = _pick(rng, BACKGROUND_WORDS[scene.background]) if rng.random() < 0.5 else ""
    remarks = []
    if rng.random() < (0.1 if scene.camera == "static" else 0.7):
        remarks.append(_pick(rng, CAMERA_WORDS[scene.camera]))
    if rng.random() < (0.1 if scene.style == "flat" else 0.5):
        remarks.append(_pick(rng, STYLE_WORDS[scene.style]))
    place_first, limit = rng.random() < 0.25, BYTES_PER_OBJECT * len(scene.objects)
    # What does not fit is dropped in the order of how little it says.
    for drop in ("", "opening", "remark", "remark", "place"):
        if drop == "opening":
            opening = ""
        elif drop == "remark":
            remarks = remarks[1:]
        elif drop == "place":
            place = ""
        caption = _join(opening, action, place, remarks, place_first)
        if len(caption) <= limit:
            return caption
    raise AssertionError(f"the words of {action!r} are longer than {limit} bytes")
