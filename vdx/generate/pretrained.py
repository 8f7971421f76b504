"""Clips from the networks of a PretrainedModel.

The networks are on the mesh one after another: the text encoder, what reads images, the
transformer (of two experts first that of high noise, then the other), the decoder.
References: `WanPipeline`, `WanImageToVideoPipeline` and `WanVACEPipeline` of diffusers.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from vdx.diffusion.process import RectifiedFlow
from vdx.diffusion.samplers import Carry, StepTable
from vdx.generate.decode import Decoder
from vdx.generate.generator import ClampedFrames, Generator
from vdx.generate.image_inputs import (
    iter_frames,
    letterbox,
    mask_channels,
    open_image,
    resize_image,
)
from vdx.generate.preprocess import preprocess_for
from vdx.generate.pretrained_request import PretrainedRequest, start_noise
from vdx.interop.lora import open_lora
from vdx.interop.pretrained import EXPERTS, PretrainedModel
from vdx.models.adapters.lora import Adapted, adapt
from vdx.models.encoders.text_tokens import PromptTokenizer
from vdx.seeds import seed_keys, seed_words
from vdx.types import Array, Batch, Params

Log = Callable[[str], None]
Arrays = dict[str, np.ndarray]
PROMPTS = 8  # prompts that the text encoder reads at once: its activations stay small
# Pixels of a frame times the latent frames that the VAE computes at once: 2**20 keeps its
# activations, the largest arrays of all, near those of one frame of 1024 x 1024.
PIXELS = 2**20


class PretrainedGenerator:
    """Draws clips in four stages: encode text, read images, denoise, decode."""

    def __init__(
        self, model: PretrainedModel, request: PretrainedRequest, mesh: Mesh, log: Log = print
    ):
        """log: receives a line with the time of each thing that is done."""
        self.model = model
        self.request = request
        self.mesh = mesh
        self.log = log
        self.preprocess = preprocess_for(request.preprocess, model.clamps_first_frame)
        self.batch = mesh.shape["data"] * mesh.shape["fsdp"]  # clips drawn at once
        self.chunk = max(1, PIXELS // (request.height * request.width))  # latent frames at once

    def __call__(self) -> np.ndarray:
        """Draw all clips: float32 [n t h w 3] in [-1, 1], on every process."""
        return np.stack([np.concatenate(list(pieces)) for pieces in self.clips(exact=True)])

    def clips(self, exact: bool = False) -> Iterator[Iterator[np.ndarray]]:
        """Yield the clips, each an iterator over its pieces [t h w 3], on every process.

        Pieces are decoded when they are read: uint8, or float32 in [-1, 1] if `exact`. Each clip
        must be used up before the next.
        """
        with jax.set_mesh(self.mesh):
            text = self.encode_text()
            images = self.read_images()
            latents = self.denoise(text, images)
            vae = self.model.components["vae"].module
            decoder = Decoder(vae, self.load("vae"), self.chunk, exact)
        for number in range(len(latents)):
            yield self.decode(decoder, latents, number)

    # Stage 1: text.

    def encode_text(self) -> Arrays:
        """Return `text` [n+1 l d] and `text_mask` [n+1 l].

        Rows are the prompts and, last, the negative prompt.
        """
        tokenize = PromptTokenizer(self.model.tokenizer)
        ids, mask = tokenize([*self.request.prompts, self.request.negative_prompt])
        params = self.load("text_encoder")
        start = time.perf_counter()
        encode = self.compile_call("text_encoder", lambda apply, ids, mask: apply(ids, mask))
        size = -(-min(len(ids), PROMPTS) // self.batch) * self.batch
        features = [
            np.asarray(encode(params, ids[rows], mask[rows])) for rows in _chunks(len(ids), size)
        ]
        self.log_time(f"{len(ids)} prompts encoded", start)
        return {"text": np.concatenate(features)[: len(ids)], "text_mask": mask}

    # Stage 2: images and videos.

    def read_images(self) -> Arrays:
        """Return the conditions other than the text, b = 1; may be empty."""
        if self.model.reads_control:
            return self.control_conditions()
        if "image" in self.request.controls:
            return self.image_conditions()
        return {}

    def image_conditions(self) -> Arrays:
        """Return the conditions of a first and last image.

        These are `image_tokens` and `concat`, or, of a model that clamps its first frame, the
        latents of that frame, `known`.
        """
        # The images, and their features for cross-attention.
        request = self.request
        controls = request.controls
        images = [
            open_image(name, controls[name]) for name in ("image", "last_image") if name in controls
        ]
        conditions = {}
        if "image_tokens" in self.model.signals:
            conditions = self.image_tokens(images)

        # A grey clip with the images at its ends: [1 t h w 3].
        frames = 1 if self.model.clamps_first_frame else request.num_frames
        video = np.zeros((1, frames, request.height, request.width, 3), np.float32)
        is_given = np.zeros(frames, bool)
        for place, image in zip((0, -1), images, strict=False):
            video[0, place] = self.preprocess.frame(image, request.height, request.width)
            is_given[place] = True

        # The VAE reads it like any clip: [1 t h w c].
        (latents,) = self.encode(video)
        if self.model.clamps_first_frame:
            return conditions | {"known": latents}

        # The mask names the frames that were given.
        rate = self.model.components["vae"].module.rates[0]
        mask = given_mask(is_given, latents.shape[1:4], rate)
        return conditions | {"concat": np.concatenate([mask[None], latents], -1)}

    def image_tokens(self, images: Sequence[Image.Image]) -> Arrays:
        """Return features of the last layer but one, those of both images in a row."""
        params = self.load("image_encoder")
        encode = self.compile_call("image_encoder", lambda apply, x: apply(x).penultimate)
        side = self.model.components["image_encoder"].module.image
        pixels = self.preprocess.clip_pixels(images, side)
        tokens = [np.asarray(encode(params, x[None])) for x in pixels]
        return {"image_tokens": np.concatenate(tokens, 1)}

    def control_conditions(self) -> Arrays:
        """Return `control` [1 t h w c] of a VACE model.

        Its channels are the latents of what stays, the latents of what is drawn anew, and the
        mask. Before the clip come the references, the last of them first, as in diffusers.
        """
        # What stays, what is drawn anew, and each reference, as clips of their own.
        clip, mask = self.read_control()
        redrawn = mask[..., None] > 0.5
        references = [
            letterbox(open_image("reference", path), self.request.height, self.request.width)
            for path in reversed(self.request.references)
        ]
        videos = [clip * ~redrawn, clip * redrawn, *(image[None] for image in references)]
        kept, changed, *seen = self.encode(*(video[None] for video in videos))

        # [1 t h w c], and [t h w side*side] of the mask.
        side = self.model.components["vae"].module.rates[1]
        channels = mask_channels(mask, kept.shape[1], side)
        control = np.concatenate([kept, changed, channels[None]], -1)

        # A reference stays as it is: nothing of it is redrawn, and its mask is black.
        missing = control.shape[-1] - kept.shape[-1]
        padded = [np.pad(latents, [(0, 0)] * 4 + [(0, missing)]) for latents in seen]
        return {"control": np.concatenate([*padded, control], 1)}

    def read_control(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (control [t h w 3] in [-1, 1], mask [t h w] in [0, 1]: 1 is drawn anew)."""
        request = self.request
        shape = (request.num_frames, request.height, request.width)
        clip: np.ndarray = np.zeros((*shape, 3), np.float32)
        mask: np.ndarray = np.ones(shape, np.float32)
        if "control" in request.controls:
            clip = self.read_frames("control", "RGB")
        if "control_mask" in request.controls:
            mask = (self.read_frames("control_mask", "L") + 1) / 2
        return clip, mask

    def read_frames(self, name: str, mode: str) -> np.ndarray:
        """Return the frames of a control's file in a mode of PIL, at the size of the clip."""
        request = self.request
        frames = iter_frames(name, request.controls[name], request.fps)
        return np.stack(
            [
                resize_image(frame.convert(mode), request.height, request.width)
                for frame in itertools.islice(frames, request.num_frames)
            ]
        )

    def encode(self, *videos: np.ndarray) -> list[np.ndarray]:
        """Return the latents of each video [b t h w 3]."""
        params = self.load("vae")
        start = time.perf_counter()
        encode = self.compile_call(
            "vae", lambda apply, x: apply(x, self.chunk, method="encode").mode()
        )
        latents = [np.asarray(encode(params, video)) for video in videos]
        self.log_time("images encoded", start)
        return latents

    # Stage 3: the transformer.

    def denoise(self, text: Arrays, images: Arrays) -> np.ndarray:
        """Return latents [n t h w c]."""
        # What all experts share: the noise, and the conditions of each chunk of clips.
        noise = start_noise(self.request, self.model)
        chunks = _chunks(len(self.request.prompts), self.batch)
        images = {name: np.repeat(x, self.batch, 0) for name, x in images.items()}
        clamped = self.clamped_frames(images.pop("known", None))

        def conditions(rows: np.ndarray) -> Arrays:
            return images | {name: values[rows] for name, values in text.items()}

        negative = conditions(np.full(self.batch, -1))
        # numpy: on a mesh of several processes an array of one device is not addressable.
        first = self.expert_generator(0, noise.shape)
        carries = [jax.tree.map(np.asarray, first.start(noise[rows])) for rows in chunks]

        # Each expert makes its evaluations for all clips, so that it is read once.
        start = 0
        for number in range(len(self.model.experts)):
            generator = self.expert_generator(number, noise.shape)
            table = generator.step_table()
            end = self.last_step(number, table)
            if start == end:
                continue

            params = self.load_expert(number)
            run_steps = self.jit(functools.partial(_run_steps, generator))
            part = {name: values[start:end] for name, values in table.items()}
            for i, rows in enumerate(chunks):
                begin = time.perf_counter()
                seeds = seed_words(self.request.seeds[row] for row in rows)
                carries[i], evaluated = jax.block_until_ready(
                    run_steps(params, conditions(rows), negative, carries[i], part, seeds, clamped)
                )
                self.log_steps(rows, start, end, len(table["t"]), evaluated, begin)
            start = end
            del params  # frees the devices' memory before the next network is read

        # The first array of a carry is the clip; repetitions of the last chunk are dropped.
        latents = np.concatenate([np.asarray(carry[0]) for carry in carries])
        latents = latents[: len(self.request.prompts)]
        if clamped is None:
            return latents

        # Known frames are exact, not what the last step made of them.
        is_generated = clamped.is_generated[:1, :, None, None, None]
        return np.where(is_generated > 0, latents, clamped.known[:1])

    def clamped_frames(self, known: np.ndarray | None) -> ClampedFrames | None:
        """Return the first latent frame `known` [b 1 h w c] as frames that stay, if given."""
        if known is None:
            return None
        frames = self.request.latent_shape(self.model)[0]
        is_generated = (np.arange(frames) > 0).astype(np.float32)
        return ClampedFrames(known, np.repeat(is_generated[None], self.batch, 0))

    def expert_generator(self, number: int, shape: Sequence[int]) -> Generator:
        """Return the sampler of an expert for latents of a shape [n t h w c]."""
        _, _, height, width, channels = shape
        return Generator(
            self.model.experts[number].module,
            RectifiedFlow(),
            self.request.expert_sampling(number),
            (height, width, channels),
        )

    def last_step(self, number: int, table: StepTable) -> int:
        """Return the evaluation before which an expert ends: the boundary, or that of all."""
        if number == len(self.model.experts) - 1:
            return len(table["t"])
        times = self.request.network_time(table["t"])
        return int(np.sum(times >= 1000 * self.model.boundary))

    def load_expert(self, number: int) -> Params | Adapted:
        """Read an expert and its adapters.

        Adapters stay factors, so that no further array of a kernel's size is made.
        """
        params = self.load(EXPERTS[number])
        adapters = self.request.adapters(number)
        if not adapters:
            return params
        module = self.model.experts[number].module
        deltas = [
            dataclasses.replace(open_lora(path, module, EXPERTS[number]), weight=weight)
            for path, weight in adapters
        ]
        return adapt(params, *deltas)

    # Stage 4: pixels.

    def decode(self, decoder: Decoder, latents: np.ndarray, number: int) -> Iterator[np.ndarray]:
        """Yield the pieces of a clip, without the references before it."""
        pieces = decoder(latents[number, len(self.request.references) :])
        frames = 0
        while True:
            start = time.perf_counter()
            # The caller may leave this context between two pieces.
            with jax.set_mesh(self.mesh):
                piece = next(pieces, None)
            if piece is None:
                return
            frames += len(piece)
            self.log_time(
                f"clip {number + 1} of {len(latents)}: {frames} of {self.request.num_frames} "
                "frames decoded",
                start,
            )
            yield piece

    # Shared by the stages.

    def load(self, name: str) -> Params:
        """Read a network onto the mesh."""
        component = self.model.components[name]
        start = time.perf_counter()
        params = component.load(self.mesh)
        self.log_time(f"{name}: {component.size / 1e6:,.1f}M parameters read", start)
        return params

    def compile_call(self, name: str, call: Callable[..., Array]) -> Callable[..., Array]:
        """Compile (params, *arrays) -> call(apply, *arrays).

        `apply` is that of the component `name` with the parameters.
        """
        module = self.model.components[name].module

        def run(params: Params, *args: Array) -> Array:
            def apply(*args: Any, **options: Any) -> Any:
                return module.apply({"params": params}, *args, **options)

            return call(apply, *args)

        return self.jit(run)

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function whose results are whole on every device."""
        return jax.jit(function, out_shardings=jax.sharding.PartitionSpec())

    def log_time(self, line: str, start: float) -> None:
        """Log what was done since `start`."""
        self.log(f"{line} ({time.perf_counter() - start:.1f} s)")

    def log_steps(
        self, rows: np.ndarray, start: int, end: int, total: int, evaluated: Array, begin: float
    ) -> None:
        """Log the evaluations start .. end - 1 of `total` for some clips."""
        ran = evaluated.any(1).sum()  # rows in which any clip needs the network
        made = f", {ran} made" if self.request.sampling["cache_threshold"] else ""
        self.log_time(
            f"clips {rows[0] + 1} to {rows[-1] + 1} of {len(self.request.prompts)}: "
            f"evaluations {start + 1} to {end} of {total}{made}",
            begin,
        )


def _run_steps(
    generator: Generator,
    params: Params | Adapted,
    batch: Batch,
    negative: Batch,
    carry: Carry,
    table: StepTable,
    seeds: Array,
    clamped: ClampedFrames | None,
) -> tuple[Carry, Array]:
    keys = seed_keys(seeds)
    return generator.run_steps(params, batch, negative, carry, table, keys, clamped)


def given_mask(is_given: np.ndarray, grid: Sequence[int], rate: int) -> np.ndarray:
    """Return float32 [t h w rate]: which of the frames of a latent frame are given.

    is_given: bool, one for each frame of the clip; the first counts for all `rate` frames of the
    first latent frame. grid: (t, h, w) of the latents.
    """
    frames = np.concatenate([np.repeat(is_given[:1], rate), is_given[1:]])
    return np.broadcast_to(frames.reshape(-1, 1, 1, rate), (*grid, rate)).astype(np.float32)


def _chunks(count: int, size: int) -> list[np.ndarray]:
    """Return the indices 0 .. count - 1, `size` at a time; repetition fills the last."""
    return [
        np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)
    ]
