"""Classes of files: how they are made, damaged, read by vdx, and read by somebody else.

`read` returns what vdx reads. `check` raises AssertionError if that is wrong: not what the format's
own library reads, or not what the honest file holds although its payload is untouched.
"""

import contextlib
import dataclasses
import json
import unicodedata
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from tests.hostile import mutations, samples
from tests.hostile.mutations import damage, mutate_json, pick
from tests.micro_run import config
from vdx import experiment
from vdx.data.sources import VideoFolder
from vdx.data.track_files import TRACK_FILES
from vdx.data.video_files import video_record
from vdx.files import read_npy
from vdx.generate.image_inputs import open_image
from vdx.generate.manifest import RunWeights, manifest_request, manifest_weights, read_manifest
from vdx.generate.request import Request
from vdx.interop.pth import read_pth
from vdx.interop.safetensors import read_header

MOST_TEXT = 1 << 20  # characters of a caption


@dataclasses.dataclass(frozen=True)
class FileClass:
    """One kind of files that strangers bring."""

    name: str  # of the file
    make: Callable[[], list[bytes]]  # honest files
    damage: Callable[[Any, bytes], bytes]  # (generator, honest file) -> hostile file
    read: Callable[[Path], Any]
    check: Callable[[Any, bytes, bytes], None]  # (what was read, hostile file, honest file)
    cases: int  # in the default suite
    address_space: int = 1 << 30  # bytes that a process may add to its own
    others: Callable[[], dict[str, bytes]] = dict  # files in the same folder


# Weights


def read_arrays(read):
    return lambda path: {name: stored.read() for name, stored in read(path).items()}


def same_arrays(got, want):
    assert got.keys() == want.keys(), f"has {sorted(got)}, not {sorted(want)}"
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), f"{name} has other numbers"


def damage_safetensors(rng, content):
    if rng.integers(3) == 0:
        return damage(rng, content)
    length = int.from_bytes(content[:8], "little")
    header, payload = content[8 : 8 + length], content[8 + length :]
    if rng.integers(4) == 0:  # other numbers, which no reader can find out
        return content[: 8 + length] + mutations.flip(rng, payload)
    header = mutate_json(rng, header) if rng.integers(4) else damage(rng, header)
    length = pick(rng, [len(header)] * 6 + [*mutations.EXTREMES, len(header) - 1])
    return length.to_bytes(8, "little") + header + payload


def check_safetensors(got, content, honest):
    same_arrays(got, load(content))


def damage_pth(rng, content):
    kind = rng.integers(6)
    if kind < 2:
        return damage(rng, content)
    if kind == 2:  # one byte of one entry's header or of the directory
        return mutations.flip_one(rng, content)
    way = damage if rng.integers(4) == 0 else mutations.mutate_pickle
    return mutations.rezip(
        content, lambda name, old: way(rng, old) if name.endswith("pkl") else old
    )


def check_pth(got, content, honest):
    for array in got.values():
        assert array.nbytes <= len(content)
    if len(content) == len(honest):
        # Bytes were changed in place. The pickle has a checksum, so the names are the honest ones,
        # and every array holds the bytes that stand where its own stood.
        want = {}
        for name, array in samples.ARRAYS.items():
            start = honest.index(array.tobytes())
            data = np.frombuffer(content, array.dtype, array.size, start)
            want[f"state_dict.{name}"] = data.reshape(array.shape)
        if pickle_of(content) == pickle_of(honest):
            same_arrays(got, want)


def pickle_of(content):
    with zipfile.ZipFile(BytesIO(content)) as archive:
        return archive.read("a/data.pkl")


def damage_npy(rng, content):
    if rng.integers(2):
        return damage(rng, content)
    header = content[10:128].decode("latin-1").rstrip()
    old, new = pick(rng, NPY_HEADERS)
    header = header.replace(old, new).encode("latin-1", "replace") + b"\n"
    version = pick(rng, [b"\1\0", b"\1\0", b"\3\0", b"\0\0"])
    return content[:6] + version + len(header).to_bytes(2, "little") + header + content[128:]


NPY_HEADERS = [
    ("<f4", "|O"),
    ("<f4", ">f4"),
    ("<f4", "<i4"),
    ("<f4", "<f8"),
    ("<f4", "<U1"),
    ("<f4", "<M8"),
    ("<f4", "|V4"),
    ("'<f4'", "[('a', '<f4')]"),
    ("'<f4'", "(" * 500),
    ("False", "True"),
    ("False", "None"),
    ("(4, 6, 8)", "(8, 6, 4)"),
    ("(4, 6, 8)", "(192,)"),
    ("(4, 6, 8)", "(4, 6, -8)"),
    ("(4, 6, 8)", "(4, 6, 8.0)"),
    ("(4, 6, 8)", "(4, 6, 99999999999999999999)"),
    ("(4, 6, 8)", "(0, 4611686018427387904)"),
    ("(4, 6, 8)", "(" + "1, " * 40 + "192)"),
    ("(4, 6, 8)", "-" * 3000 + "1"),
    ("(4, 6, 8)", "()" + " " * 5000),
]


def check_npy(got, content, honest):
    want = np.load(BytesIO(content), allow_pickle=False)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert got.tobytes() == want.tobytes()


# JSON


def damage_json(rng, content):
    return damage(rng, content) if rng.integers(3) == 0 else mutate_json(rng, content)


def read_whole_manifest(path):
    manifest = read_manifest(path)
    manifest_request(manifest, Request)
    manifest_weights(manifest, RunWeights)
    return manifest


def strict_json(text):
    """Return a JSON value. Raises ValueError for a name twice, and for NaN and infinity."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    value = json.loads(text, object_pairs_hook=unique)
    json.dumps(value, allow_nan=False)
    return value


def check_json(got, content, honest):
    assert got == strict_json(content.decode("utf-8-sig"))


def damage_metadata(rng, content):
    if rng.integers(2):
        return damage_text(rng, content)
    lines = content.split(b"\n")
    lines[0] = mutate_json(rng, lines[0])
    return b"\n".join(lines)


def read_captions(path):
    """Return the captions of a folder; the one of a bad record is the error."""
    folder = VideoFolder(str(path.parent))
    captions = [folder[i].caption for i in range(len(folder))]
    for text in captions:
        assert isinstance(text, str) and len(text) <= MOST_TEXT
        assert not text.startswith("\ufeff")
    return captions


def check_metadata(got, content, honest):
    wanted = set()
    for encoding in ENCODINGS:
        text = unicodedata.normalize("NFC", content.decode(encoding, "ignore"))
        for line in text.split("\n"):
            with contextlib.suppress(ValueError):
                row = strict_json(line.strip("\ufeff"))
                wanted.add(str(row.get("caption")) if isinstance(row, dict) else "")
    for caption in got:
        text = unicodedata.normalize("NFC", caption)
        assert any(text in want for want in wanted), caption[:80]


# Text

ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "utf-8"]
TEXTS = ["\0", "\u2028", "\ufeff", "\r\n", "e\u0301", "\N{GRINNING FACE}", "a" * 100_000, " " * 999]


def damage_text(rng, content):
    kind = rng.integers(4)
    if kind == 0:
        return damage(rng, content)
    text = content.decode()
    if kind > 1:
        place = int(rng.integers(len(text)))
        text = text[:place] + pick(rng, TEXTS) + text[place:]
    if kind == 3:
        return text.encode()
    return text.encode(pick(rng, ENCODINGS), "replace")


def check_caption(got, content, honest):
    texts = [content.decode(encoding, "ignore") for encoding in ENCODINGS]
    squeezed = {" ".join(unicodedata.normalize("NFC", text).split()) for text in texts}
    for caption in got:
        want = " ".join(unicodedata.normalize("NFC", caption).split())
        assert any(want in text for text in squeezed), caption[:80]


# Pixels


def read_image(path):
    path = path.rename(path.with_suffix(".png"))
    image = np.asarray(open_image("image", str(path)))
    reference = TRACK_FILES["reference"](path, np.arange(1), 1, lambda: np.zeros(0))
    for pixels in (image, reference[0]):
        assert pixels.dtype == np.uint8 and pixels.shape[2:] == (3,)
    return image


def read_video(path):
    record = video_record(path.name, "", lambda: str(path))
    stamps = record.timestamps
    frames = record.read(stamps[[0, len(stamps) // 2]])
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3
    return frames


def check_pixels(read_honest):
    """A file with more bytes at its end is the honest file."""

    def check(got, content, honest):
        if content.startswith(honest):
            np.testing.assert_array_equal(got, read_honest(honest))

    return check


def through_file(read, name):
    """Return read(content) for a function that reads a path."""

    def call(content):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_bytes(content)
            return read(path)

    return call


CLASSES = {
    "safetensors": FileClass(
        "weights.safetensors",
        lambda: [samples.safetensors()],
        damage_safetensors,
        read_arrays(read_header),
        check_safetensors,
        cases=300,
    ),
    "pth": FileClass(
        "weights.pth",
        lambda: [samples.pth()],
        damage_pth,
        read_arrays(read_pth),
        check_pth,
        cases=400,
    ),
    "npy": FileClass(
        "maps.npy", lambda: [samples.npy()], damage_npy, read_npy, check_npy, cases=300
    ),
    "manifest": FileClass(
        "manifest.json",
        lambda: [samples.manifest()],
        damage_json,
        read_whole_manifest,
        check_json,
        cases=300,
    ),
    "config": FileClass(
        "config.json",
        lambda: [json.dumps(config("--config.model.backbone.depth=1")).encode()],
        damage_json,
        lambda path: experiment.load(path.parent).config,
        check_json,
        cases=200,
        address_space=1 << 34,  # XLA reserves far more than it uses
    ),
    "metadata": FileClass(
        "metadata.jsonl",
        lambda: [samples.metadata()],
        damage_metadata,
        read_captions,
        check_metadata,
        cases=300,
        others=lambda: {"a.mp4": samples.video("mp4")},
    ),
    "caption": FileClass(
        "a.txt",
        lambda: [samples.caption()],
        damage_text,
        read_captions,
        check_caption,
        cases=300,
        others=lambda: {"a.mp4": samples.video("mp4")},
    ),
    "image": FileClass(
        "image.png",
        lambda: [samples.image(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP")],
        damage,
        read_image,
        check_pixels(through_file(read_image, "image.png")),
        cases=300,
    ),
    "video": FileClass(
        "clip.mp4",
        lambda: [
            samples.video("mp4"),
            samples.video("matroska"),
            samples.video("avi", "mpeg4"),
        ],
        damage,
        read_video,
        check_pixels(through_file(read_video, "clip.mp4")),
        cases=300,
    ),
}
