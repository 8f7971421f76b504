"""Clips from public weights: prompts and pictures through the networks of a PublicModel.

The networks are put on the mesh one after another and let go again: the text encoder, what reads
pictures, the transformer (of two experts first that of high noise, then the other), the decoder.
References: `WanPipeline`, `WanImageToVideoPipeline` and `WanVACEPipeline` of diffusers.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from vdx.diffusion.process import RectifiedFlow
from vdx.diffusion.samplers import Carry
from vdx.generate.decode import Decoder
from vdx.generate.generator import Generator
from vdx.generate.image_inputs import (
    fitted,
    iter_frames,
    letterbox,
    mask_channels,
    open_picture,
)
from vdx.generate.pretrained_request import PretrainedRequest, start_noise
from vdx.interop.lora import open_lora
from vdx.interop.pretrained import EXPERTS, PretrainedModel
from vdx.models.adapters.lora import Adapted, adapt
from vdx.models.encoders.clip import preprocess
from vdx.models.encoders.text_tokens import PromptTokenizer
from vdx.types import Array, Params

Say = Callable[[str], None]
Arrays = dict[str, np.ndarray]
PROMPTS = 8  # encoded at once
PIXELS = 2**20  # of a frame, times the latent frames that the VAE computes at once


class PretrainedGenerator:
    """Draws the clips of a request; `say` is control what has been done, and how long it took."""

    def __init__(
        self, model: PretrainedModel, request: PretrainedRequest, mesh: Mesh, say: Say = print
    ):
        self.model, self.request, self.mesh, self.say = model, request, mesh, say
        self.parts = mesh.shape["data"] * mesh.shape["fsdp"]  # clips drawn at once
        self.chunk = max(1, PIXELS // (request.height * request.width))

    def __call__(self) -> np.ndarray:
        """float32 [n t h w 3] in [-1, 1], on every process."""
        return np.stack([np.concatenate(list(pieces)) for pieces in self.clips(exact=True)])

    def clips(self, exact: bool = False) -> Iterator[Iterator[np.ndarray]]:
        """The clips one after another, each piece by piece [t h w 3] as they are decoded, on every
        process: uint8, or, `exact`, float32 in [-1, 1]. Each must be used up before the next."""
        with jax.set_mesh(self.mesh):
            text = self.text()
            shown = (
                self.control()
                if self.model.reads_control
                else self.pictures()
                if self.request.image
                else {}
            )
            latents = self.denoise(text, shown)
            decoder = Decoder(
                self.model.components["vae"].module, self.load("vae"), self.chunk, exact
            )
        for number in range(len(latents)):
            yield self.decode(decoder, latents, number)

    def load(self, name: str) -> Params:
        component, start = self.model.components[name], time.perf_counter()
        params = component.load(self.mesh)
        self.done(f"{name}: {component.size / 1e6:,.1f}M parameters read", start)
        return params

    def done(self, what: str, start: float) -> None:
        self.say(f"{what} ({time.perf_counter() - start:.1f} s)")

    def compiled(self, name: str, call: Callable) -> Callable:
        """(params, *arrays) -> call(apply, *arrays), jitted; `apply` is that of the component."""
        module = self.model.components[name].module

        def run(params, *args):
            def apply(*args, **how):
                return module.apply({"params": params}, *args, **how)

            return call(apply, *args)

        return self.jitted(run)

    def jitted(self, function: Callable) -> Callable:
        """What it returns is whole on every device."""
        return jax.jit(function, out_shardings=jax.sharding.PartitionSpec())

    def text(self) -> Arrays:
        """`text` [n+1 l d] and `text_mask`: of the prompts and, last, of the negative one."""
        tokenize = PromptTokenizer(self.model.tokenizer)
        ids, mask = tokenize([*self.request.prompts, self.request.negative_prompt])
        params, start = self.load("text_encoder"), time.perf_counter()
        encode = self.compiled("text_encoder", lambda apply, ids, mask: apply(ids, mask))
        size = -(-min(len(ids), PROMPTS) // self.parts) * self.parts
        features = [
            np.asarray(encode(params, ids[rows], mask[rows])) for rows in _chunks(len(ids), size)
        ]
        self.done(f"{len(ids)} prompts encoded", start)
        return {"text": np.concatenate(features)[: len(ids)], "text_mask": mask}

    def pictures(self) -> Arrays:
        """What the transformer is control of the pictures, b = 1: `image_tokens` and `concat`, or
        `known`, the latents of the first frame."""
        r, held = self.request, self.model.clamps_first_frame
        given = [
            open_picture(name, path)
            for name, path in (("image", r.image), ("last_image", r.last_image))
            if path
        ]
        out = self.image_tokens(given) if "image_tokens" in self.model.signals else {}

        video = np.zeros((1, 1 if held else r.num_frames, r.height, r.width, 3), np.float32)
        shown = np.zeros(video.shape[1], bool)
        for place, picture in zip((0, -1), given, strict=False):
            video[0, place] = fitted(picture, r.height, r.width)
            shown[place] = True
        (latents,) = self.encode(video)
        if held:
            return out | {"known": latents}
        mask = shown_mask(shown, latents.shape[1:4], self.model.components["vae"].module.rates[0])
        return out | {"concat": np.concatenate([mask[None], latents], -1)}

    def image_tokens(self, pictures: Sequence[Image.Image]) -> Arrays:
        """Features of the last layer but one, those of both pictures in a row."""
        params = self.load("image_encoder")
        see = self.compiled("image_encoder", lambda apply, x: apply(x).penultimate)
        pixels = preprocess(
            [np.asarray(picture) for picture in pictures],
            self.model.components["image_encoder"].module.image,
        )
        return {
            "image_tokens": np.concatenate([np.asarray(see(params, x[None])) for x in pixels], 1)
        }

    def encode(self, *videos: np.ndarray) -> list[np.ndarray]:
        """Latents of each [b t h w 3]."""
        params, start = self.load("vae"), time.perf_counter()
        encode = self.compiled("vae", lambda apply, x: apply(x, self.chunk, method="encode").mode())
        out = [np.asarray(encode(params, video)) for video in videos]
        self.done("pictures encoded", start)
        return out

    def control(self) -> Arrays:
        """`control`, b = 1: latents of what stays, of what is drawn anew, and the mask. Before it
        are those of the references, the last of them first, as in diffusers."""
        r = self.request

        def read(name: str, path: str, mode: str) -> np.ndarray:
            frames = itertools.islice(iter_frames(name, path, r.fps), r.num_frames)
            return np.stack([fitted(f.convert(mode), r.height, r.width) for f in frames])

        shape = r.num_frames, r.height, r.width
        clip = read("control", r.control, "RGB") if r.control else np.zeros((*shape, 3), np.float32)
        mask = (
            (read("control_mask", r.control_mask, "L") + 1) / 2
            if r.control_mask
            else np.ones(shape, np.float32)
        )
        anew = mask[..., None] > 0.5
        references = [
            letterbox(open_picture("reference", path), r.height, r.width)[None]
            for path in reversed(r.reference)
        ]
        stays, changes, *seen = self.encode(
            *(x[None] for x in (clip * ~anew, clip * anew, *references))
        )
        mask = mask_channels(mask, stays.shape[1], self.model.components["vae"].module.rates[1])
        control = np.concatenate([stays, changes, mask[None]], -1)
        # A reference stays as it is, and its mask is black.
        rows = [np.pad(x, [(0, 0)] * 4 + [(0, control.shape[-1] - x.shape[-1])]) for x in seen]
        return {"control": np.concatenate([*rows, control], 1)}

    def denoise(self, text: Arrays, pictures: Arrays) -> np.ndarray:
        """Latents [n t h w c]."""
        r, experts, first = self.request, self.model.experts, 0
        scene = {k: np.repeat(v, self.parts, 0) for k, v in pictures.items()}
        known = None
        if "known" in scene:
            is_generated = (np.arange(r.latents(self.model)[0]) > 0).astype(np.float32)
            known = scene.pop("known"), np.repeat(is_generated[None], self.parts, 0)

        def conditions(rows: np.ndarray) -> Arrays:
            return scene | {name: values[rows] for name, values in text.items()}

        noise, chunks = start_noise(r, self.model), _chunks(len(r.prompts), self.parts)
        negative = conditions(np.full(self.parts, -1))
        carries: list[Carry] = []
        for number, expert in enumerate(experts):
            generator = Generator(
                expert.module, RectifiedFlow(), r.sampling(number), noise.shape[2:]
            )
            # numpy: on a mesh of several processes an array of one device would be a stranger.
            carries = carries or [
                jax.tree.map(np.asarray, generator.start(noise[rows])) for rows in chunks
            ]
            plan = generator.step_table()
            last = (
                len(plan["t"])
                if expert is experts[-1]
                else int(np.sum(r.network_time(plan["t"]) >= 1000 * self.model.boundary))
            )
            if first == last:
                continue
            params: Params | Adapted = self.load(EXPERTS[number])
            if adapters := r.adapters(number):  # beside the kernels: nothing of their size
                params = adapt(
                    params,
                    *(
                        dataclasses.replace(
                            open_lora(path, expert.module, EXPERTS[number]), weight=weight
                        )
                        for path, weight in adapters
                    ),
                )
            run_steps = self.jitted(functools.partial(_advance, generator))
            for i, rows in enumerate(chunks):
                start = time.perf_counter()
                carries[i], asked = jax.block_until_ready(
                    run_steps(
                        params,
                        conditions(rows),
                        negative,
                        carries[i],
                        {name: values[first:last] for name, values in plan.items()},
                        r.seed + int(rows[0]),
                        known,
                    )
                )
                self.done(
                    f"clips {rows[0] + 1} to {rows[-1] + 1} of {len(r.prompts)}: "
                    f"evaluations {first + 1} to {last} of {len(plan['t'])}"
                    f"{f', {asked.sum()} made' if r.cache_threshold else ''}",
                    start,
                )
            first = last
            del params
        latents = np.concatenate([np.asarray(carry[0]) for carry in carries])[: len(r.prompts)]
        return (
            latents
            if known is None
            else np.where(known[1][:1, :, None, None, None] > 0, latents, known[0][:1])
        )

    def decode(self, decoder: Decoder, latents: np.ndarray, number: int) -> Iterator[np.ndarray]:
        """The pieces of a clip, without the references before it."""
        pieces, shown = decoder(latents[number, len(self.request.reference) :]), 0
        while True:
            start = time.perf_counter()
            with jax.set_mesh(self.mesh):
                piece = next(pieces, None)
            if piece is None:
                return
            shown += len(piece)
            self.done(
                f"clip {number + 1} of {len(latents)}: {shown} of {self.request.num_frames} "
                "frames decoded",
                start,
            )
            yield piece


def _advance(
    generator: Generator, params, batch, negative, carry, rows, seed, known
) -> tuple[Carry, Array]:
    return generator.run_steps(params, batch, negative, carry, rows, jax.random.key(seed), known)


def shown_mask(shown: np.ndarray, grid: Sequence[int], rate: int) -> np.ndarray:
    """float32 [t h w rate]: which of the frames behind a latent frame are given. `shown`: bool,
    a frame of the clip each; the first stands for the `rate` frames of the first latent one."""
    each = np.concatenate([np.repeat(shown[:1], rate), shown[1:]]).reshape(-1, 1, 1, rate)
    return np.broadcast_to(each, (*grid, rate)).astype(np.float32)


def _chunks(count: int, size: int) -> list[np.ndarray]:
    """Indices 0 .. count - 1, `size` at a time; the last are filled up by repetition."""
    return [
        np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)
    ]
