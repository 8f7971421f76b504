"""Encoders of clips and captions into the cache, with a file for each result.

The networks are on the mesh one after another. A key covers the clip or the caption, the version
of the stage, the settings that matter and the identity of the network. Several hosts each encode
every n-th key that is not there.
"""

import collections
import functools
import io
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from vdx.config.build import ConfigError
from vdx.data.motion import motion_score
from vdx.data.preparation.pieces import LatentSettings, Piece, cut_pieces
from vdx.data.preparation.store import MOST_BYTES, Store, key_of
from vdx.data.record import BadRecord
from vdx.files import read_bounded
from vdx.generate.image_inputs import given_mask
from vdx.generate.preprocess import crop_for_clip
from vdx.generate.pretrained import PIXELS, PROMPTS
from vdx.generate.pretrained_networks import Arrays, PretrainedNetworks
from vdx.parallel import MeshSpec
from vdx.preparation.batching import BatchRunner
from vdx.preparation.encoder_model import EncoderModel

__all__ = ["ClipFile", "Encoders", "read_arrays"]

Encode = Callable[[np.ndarray], np.ndarray]

VERSION = 1  # of the results; a change of the encoding raises it
AHEAD = 4  # clips that are decoded while others are encoded
MOST_FLOAT16 = 65504.0


class ClipFile(NamedTuple):
    """A clip of the cache."""

    key: str  # of the cache of clips
    path: Path
    name: str  # for messages


class Encoders:
    """The encoders of a pretrained model, with the cache of their results."""

    def __init__(self, model: EncoderModel, settings: LatentSettings, cache: Path) -> None:
        """Open the cache; networks are on the devices of this host."""
        self.model = model
        self.settings = settings
        devices = jax.local_devices()
        self.parts = len(devices)  # devices that share a batch
        self.mesh = MeshSpec().make(devices)
        # The text encoder is the only large network; its weights are split as far as they divide.
        shares = math.gcd(len(devices), model.components["text_encoder"].module.width)
        self.text_mesh = MeshSpec(data=-1, fsdp=shares).make(devices)
        self.tokenize = model.tokenizer()
        self.latents = Store(cache, "latents", ".npz")
        self.text = Store(cache, "text", ".npz")
        self.tokens = Store(cache, "image_tokens", ".npz")
        self._latest: dict[str, Arrays] = {}  # of the clip that was read last
        self.identities = {
            name: component.identity() for name, component in model.components.items()
        }

    @property
    def signals(self) -> tuple[str, ...]:
        """The arrays of a record that belong to its piece."""
        names = {"concat": self.model.has_concat, "image_tokens": self.model.has_tokens}
        return ("latents", *(name for name, is_read in names.items() if is_read), "motion")

    def read_clip(self, clip: str) -> Arrays:
        """Return the arrays of a clip of the cache, given its key."""
        if clip not in self._latest:
            arrays = read_arrays(self.latents.path(self.latent_key(clip)))
            if self.model.has_tokens and "reason" not in arrays:
                arrays |= read_arrays(self.tokens.path(self.token_key(clip)))
            self._latest = {clip: arrays}
        return self._latest[clip]

    def remove_parts(self) -> None:
        """Remove the unfinished files that a killed run has left."""
        for store in (self.latents, self.text, self.tokens):
            store.remove_parts()

    def networks(self, mesh: Mesh) -> PretrainedNetworks:
        """Return the networks on a mesh."""
        log = functools.partial(print, flush=True)
        return PretrainedNetworks(self.model.components, mesh, log)

    # Keys

    def latent_key(self, clip: str) -> str:
        """Return the key of the latents of a clip, given its key."""
        return key_of(
            stage="latents",
            version=VERSION,
            settings={
                "fps": self.settings.fps,
                "shapes": [[shape.frames, *shape.size] for shape in self.settings.shapes],
            },
            clip=clip,
            vae=self.identities["vae"],
            concat=self.model.has_concat,
            first=self.model.has_tokens,
        )

    def token_key(self, clip: str) -> str:
        """Return the key of the image tokens of a clip, given its key."""
        encoder = self.identities.get("image_encoder")
        return key_of(stage="image_tokens", latents=self.latent_key(clip), encoder=encoder)

    def text_key(self, caption: str) -> str:
        """Return the key of the features of a caption; it covers the token ids alone."""
        ids, mask = self.tokenize([caption])
        return key_of(
            stage="text",
            version=VERSION,
            ids=ids[mask].tolist(),
            dtype=self.settings.dtype,
            encoder=self.identities["text_encoder"],
        )

    # The networks, one after another

    def encode_clips(self, clips: Sequence[ClipFile]) -> None:
        """Encode the pieces of those clips that are not in the cache.

        A file has latents [n t h w c], start [n] and motion [n] of n pieces; with
        `model.has_concat` also concat, with `model.has_tokens` the first frames, uint8 [n h w 3]. A
        clip without pieces has a file with the reason.
        """
        todo = self._own_share(clips, lambda clip: self.latents.has(self.latent_key(clip.key)))
        if not todo:
            return
        height, width = max((s.size for s in self.settings.shapes), key=lambda s: s[0] * s[1])
        with jax.set_mesh(self.mesh):
            chunk = max(1, PIXELS // (height * width))  # latent frames at once
            encode = self.networks(self.mesh).video_encoder(chunk)
            run = BatchRunner(self.settings.batch, self.parts)
            batches = _ClipBatches(self, lambda video: run(encode, video), lambda: run.rows)
            with tqdm(total=len(todo), desc="latents", unit="clip", dynamic_ncols=True) as bar:
                for clip, pieces in _read_ahead(todo, self.settings):
                    batches.add(clip, pieces)
                    bar.update()
                batches.flush()

    def encode_captions(self, captions: Sequence[str]) -> None:
        """Encode those captions that are not in the cache.

        A file has text float16 [l d], without padding.
        """
        keys = {self.text_key(caption): caption for caption in sorted(set(captions))}
        todo = self._own_share(sorted(keys), self.text.has)
        if not todo:
            return

        # Captions that are padded to one length make a batch.
        groups: dict[int, list[str]] = collections.defaultdict(list)
        for key in todo:
            ids, _ = self.tokenize([keys[key]])
            groups[ids.shape[1]].append(key)

        with jax.set_mesh(self.text_mesh):
            encode = self.networks(self.text_mesh).text_encoder()
            run = BatchRunner(max(self.settings.batch, PROMPTS // self.parts), self.parts)
            with tqdm(total=len(todo), desc="text", unit="caption", dynamic_ncols=True) as bar:
                for group in groups.values():
                    for first in range(0, len(group), run.rows):
                        part = group[first : first + run.rows]
                        self._encode_text(part, [keys[key] for key in part], run, encode)
                        bar.update(len(part))

    def _encode_text(
        self,
        keys: Sequence[str],
        captions: Sequence[str],
        run: BatchRunner,
        encode: Callable[..., np.ndarray],
    ) -> None:
        """Encode captions of one padded length."""
        ids, mask = self.tokenize(captions)
        features = run(encode, ids, mask)
        for key, caption, values, real in zip(keys, captions, features, mask, strict=True):
            text = _half(values[real], f"features of {caption!r}")
            self.text.get(key, functools.partial(_to_npz, text=text))

    def encode_images(self, clips: Sequence[ClipFile]) -> None:
        """Encode the first frames of the pieces: image_tokens float16 [n m d]."""
        todo = self._own_share(clips, lambda clip: self.tokens.has(self.token_key(clip.key)))
        if not self.model.has_tokens or not todo:
            return
        side = self.model.components["image_encoder"].module.image
        with jax.set_mesh(self.mesh):
            encode = self.networks(self.mesh).image_encoder()
            run = BatchRunner(self.settings.batch, self.parts)
            for clip in tqdm(todo, desc="image tokens", unit="clip", dynamic_ncols=True):
                arrays = read_arrays(self.latents.path(self.latent_key(clip.key)))
                if "reason" in arrays:
                    continue
                images = [Image.fromarray(frame) for frame in arrays["first"]]
                pixels = crop_for_clip(images, side)
                tokens = _half(run(encode, np.asarray(pixels)), f"image features of {clip.name}")
                key = self.token_key(clip.key)
                self.tokens.get(key, functools.partial(_to_npz, image_tokens=tokens))

    def _own_share(self, items: Sequence[Any], is_done: Callable[[Any], bool]) -> list[Any]:
        """Return the items of this host that are not done.

        Shares are those of all items: hosts see files of one another appear at different times.
        """
        own = items[jax.process_index() :: jax.process_count()]
        return [item for item in own if not is_done(item)]


class _ClipBatches:
    """Pieces of several clips, encoded when a batch of one shape is full.

    The file of a clip is written when the last of its pieces is encoded.
    """

    def __init__(self, encoders: Encoders, encode: Encode, rows: Callable[[], int]) -> None:
        """encode(video float32 [b t h w 3]) -> latents. rows: the size of a batch."""
        self.encoders = encoders
        self.encode = encode
        self.rows = rows
        self.pending: dict[tuple[int, ...], list[_Pending]] = collections.defaultdict(list)

    def add(self, clip: ClipFile, pieces: list[Piece] | BadRecord) -> None:
        """Add the pieces of a clip, or why it has none."""
        if isinstance(pieces, BadRecord):
            self._write(clip, {"reason": np.array(pieces.reason)})
            return
        done: list[Arrays | None] = [None] * len(pieces)
        for number, piece in enumerate(pieces):
            group = self.pending[piece.video.shape]
            group.append(_Pending(clip, piece, number, done))
            if len(group) >= self.rows():
                self._encode(piece.video.shape)

    def flush(self) -> None:
        """Encode what is left."""
        for shape in list(self.pending):
            self._encode(shape)

    def _encode(self, shape: tuple[int, ...]) -> None:
        """Encode the pieces of a shape; write the clips that are complete."""
        group = self.pending.pop(shape)
        video = np.stack([one.piece.video for one in group]).astype(np.float32) / 127.5 - 1
        results = {"latents": self.encode(video)}
        if self.encoders.model.has_concat:
            results["concat"] = self._first_frame(video)

        for row, (clip, piece, number, done) in enumerate(group):
            arrays = {
                name: _half(values[row], f"{name} of {clip.name}")
                for name, values in results.items()
            }
            arrays["start"] = np.asarray(piece.start, np.float64)
            motion = motion_score(piece.video, self.encoders.settings.fps)
            arrays["motion"] = np.asarray(motion, np.float32)
            if self.encoders.model.has_tokens:
                arrays["first"] = piece.video[0]
            done[number] = arrays
            whole = [one for one in done if one is not None]
            if len(whole) == len(done):
                self._write(clip, {name: np.stack([a[name] for a in whole]) for name in arrays})

    def _first_frame(self, video: np.ndarray) -> np.ndarray:
        """Return [b t h w c]: a mask, and latents of the first frame before grey ones."""
        grey = np.zeros_like(video)
        grey[:, 0] = video[:, 0]
        latents = self.encode(grey)
        is_given = np.arange(video.shape[1]) == 0
        mask = given_mask(is_given, latents.shape[1:4], self.encoders.model.rate)
        return np.concatenate([np.broadcast_to(mask, (len(video), *mask.shape)), latents], -1)

    def _write(self, clip: ClipFile, arrays: Arrays) -> None:
        key = self.encoders.latent_key(clip.key)
        self.encoders.latents.get(key, lambda: _to_npz(**arrays))


class _Pending(NamedTuple):
    """A piece that waits for others of its shape."""

    clip: ClipFile
    piece: Piece
    number: int  # in its clip
    done: list[Arrays | None]  # of the pieces of its clip, shared by them


def _read_ahead(
    clips: Sequence[ClipFile], settings: LatentSettings
) -> Iterator[tuple[ClipFile, list[Piece] | BadRecord]]:
    """Yield the pieces of clips, or why there are none; threads decode the next clips."""

    def read(clip: ClipFile) -> list[Piece] | BadRecord:
        try:
            data = read_bounded(clip.path, MOST_BYTES)
            return list(cut_pieces(clip.name, data, settings).pieces)
        except BadRecord as error:
            return error

    with ThreadPoolExecutor(AHEAD) as pool:
        futures: collections.deque[Future[Any]] = collections.deque()
        for number, clip in enumerate(clips):
            while len(futures) < AHEAD and number + len(futures) < len(clips):
                futures.append(pool.submit(read, clips[number + len(futures)]))
            yield clip, futures.popleft().result()


def _half(values: np.ndarray, what: str) -> np.ndarray:
    """Return float16. Raises ConfigError for values that it does not hold."""
    if not np.abs(values).max() <= MOST_FLOAT16:
        raise ConfigError(
            f"The {what} hold NaN, infinity or more than {MOST_FLOAT16:g}: either the weights are "
            "damaged, or an activation overflows: try --config.latents.dtype=float32."
        )
    return np.asarray(values, np.float16)


def _to_npz(**arrays: np.ndarray) -> bytes:
    """Return arrays as the bytes of a file, the same on every machine."""
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file of the cache."""
    with np.load(io.BytesIO(read_bounded(path, MOST_BYTES)), allow_pickle=False) as arrays:
        return dict(arrays)
