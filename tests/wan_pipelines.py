"""Tiny Wan pipelines of diffusers with random weights, in folders, and the clips they draw."""

import functools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from vdx.generate.video_io import read_video, write_video

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "walks", "the", "street", "blurred", "grey"]
PROMPT, NEGATIVE = "a cat walks  the street", "blurred grey"
FRAMES, HEIGHT, WIDTH, STEPS = 9, 32, 48, 5
REFERENCES = 2
# Light VAEs: test_video_vae.py compares those with all kinds of layers.
VAE = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 0,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.7, 1.0, 2.0],
}
VAE_22 = VAE | {
    "decoder_base_dim": 12,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}
TEXT = dict(
    vocab_size=len(WORDS),
    d_model=16,
    d_kv=6,
    d_ff=32,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
)
VISION = dict(
    hidden_size=20,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    hidden_act="gelu",
)
NETWORK = dict(
    patch_size=[1, 2, 2],
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=256,
    ffn_dim=64,
    num_layers=2,
    cross_attn_norm=True,
)
PICTURE = NETWORK | dict(in_channels=4 + 4 + 4)
CLIP = PICTURE | dict(image_dim=20, added_kv_proj_dim=48)
VACE = NETWORK | dict(vace_layers=[0, 1], vace_in_channels=4 + 4 + 64)
UNIPC = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
# kind: (network, experts' boundary, scheduler, its image inputs, guidance)
KINDS: dict[str, tuple[dict, float | None, str, tuple[str, ...], tuple[float, ...]]] = {
    "t2v": (NETWORK, None, "unipc", (), (5.0,)),
    "t2v euler": (NETWORK, None, "euler", (), (5.0,)),
    "i2v": (CLIP, None, "unipc", ("image",), (5.0,)),
    "flf2v": (CLIP | {"pos_embed_seq_len": 10}, None, "euler", ("image", "last_image"), (5.0,)),
    "a14b t2v": (NETWORK, 0.875, "unipc", (), (6.0, 2.0)),
    "a14b i2v": (PICTURE, 0.9, "euler", ("image", "last_image"), (3.5, 2.5)),
    "5b": (NETWORK, None, "unipc", (), (5.0,)),
    "5b image": (NETWORK, None, "unipc", ("image",), (5.0,)),
    "vace": (VACE, None, "unipc", ("control", "control_mask", "reference"), (5.0,)),
    "vace control": (VACE, None, "unipc", ("control",), (5.0,)),
    "vace reference": (VACE, None, "euler", ("reference",), (5.0,)),
    "vace two": (VACE, 0.875, "unipc", ("control", "control_mask"), (5.0, 3.0)),
    "vace text": (VACE, None, "unipc", (), (5.0,)),
}


def randomised(model, seed: int):
    """Every parameter drawn, so that what passes through keeps its size."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if ("norm" in name and name.endswith("weight")) or "gamma" in name:
                p.copy_(1 + 0.1 * noise)
            elif "embed_tokens" in name or "shared" in name:
                p.copy_(noise)
            else:
                p.copy_(noise * (0.2 if p.ndim == 1 else np.prod(p.shape[1:]) ** -0.5))
            if name == "decoder.conv_out.weight":  # pixels within [-1, 1]
                p.mul_(0.3)
            elif "attn2.norm" in name or "time_proj.weight" in name or "patch_emb" in name:
                p.mul_(2.5)  # prompts, times and pictures matter: attention is sharp
    return model.eval()


def tokenizer():
    import tokenizers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def scheduler(name: str):
    if name == "unipc":
        return diffusers.UniPCMultistepScheduler(**UNIPC)
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


@functools.cache
def pipeline(kind: str):
    network, boundary, schedule, shown, _ = KINDS[kind]
    return assembled(
        network,
        scheduler(schedule),
        boundary,
        "image" in shown,
        VAE_22 if kind.startswith("5b") else VAE,
    )


def assembled(
    network: dict,
    schedule,
    boundary: float | None,
    pictures: bool,
    vae: dict,
    vision: dict = VISION,
    text: dict = TEXT,
):
    """The pipeline of parts of these sizes; pictures: it begins with one."""
    transformer = (
        diffusers.WanVACETransformer3DModel
        if "vace_layers" in network
        else diffusers.WanTransformer3DModel
    )
    parts: dict[str, Any] = dict(
        tokenizer=tokenizer(),
        scheduler=schedule,
        boundary_ratio=boundary,
        text_encoder=randomised(transformers.UMT5EncoderModel(transformers.UMT5Config(**text)), 1),
        vae=randomised(diffusers.AutoencoderKLWan(**vae), 2),
        transformer=randomised(transformer(**network), 3),
        transformer_2=randomised(transformer(**network), 4) if boundary else None,
    )
    if "vace_layers" in network:
        return diffusers.WanVACEPipeline(**parts)
    parts["expand_timesteps"] = vae.get("is_residual", False)
    if not pictures:
        return diffusers.WanPipeline(**parts)
    if "image_dim" in network:
        size = vision["image_size"]
        parts |= dict(
            image_encoder=randomised(
                transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)), 5
            ),
            image_processor=transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size}
            ),
        )
    return diffusers.WanImageToVideoPipeline(**parts)


def coarse(rng, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def shown(name: str, folder: Path, rng) -> tuple[str | tuple[str, ...], dict[str, Any]]:
    """(file or files for ours, the same inputs for diffusers)."""
    if name == "reference":
        pictures, files = [coarse(rng, 70, 50), coarse(rng, 20, 17)], []
        assert len(pictures) == REFERENCES
        for i, picture in enumerate(pictures):
            files.append(str(folder / f"{name}_{i}.png"))
            picture.save(files[-1])
        return tuple(files), {"reference_images": pictures}
    if name.startswith("control"):  # longer and larger than the clip
        frames = [np.asarray(coarse(rng, 2 * WIDTH, 2 * HEIGHT)) for _ in range(FRAMES + 2)]
        if name == "control_mask":
            frames = [np.repeat(frame[..., :1], 3, -1) for frame in frames]
        file = folder / f"{name}.mp4"
        write_video(file, np.stack(frames), 16, min_side=1)
        read = [Image.fromarray(frame) for frame in read_video(file)[0][:FRAMES]]
        return str(file), {"mask": [p.convert("L") for p in read]} if "mask" in name else {
            "video": read
        }
    picture, file = coarse(rng, 70, 50), folder / f"{name}.png"
    picture.save(file)
    return str(file), {name: picture}


class Case:
    """A pipeline in a folder, its clip float32 [1 t h w 3] in [-1, 1], and the request to ours."""

    def __init__(self, kind: str, folder: Path):
        names, self.guidance = KINDS[kind][3:]
        self.folder, self.pipeline = folder, pipeline(kind)
        self.pipeline.save_pretrained(folder)
        rng = np.random.default_rng(7)
        side, self.size = (16, (64, 64)) if kind.startswith("5b") else (8, (HEIGHT, WIDTH))
        frames = (FRAMES - 1) // 4 + 1 + REFERENCES * ("reference" in names)
        self.noise = rng.normal(
            size=(1, frames, self.size[0] // side, self.size[1] // side, 4)
        ).astype(np.float32)
        np.save(folder / "noise.npy", self.noise)
        self.given: dict[str, Any] = {}  # to theirs
        self.files: dict[str, str | tuple[str, ...]] = {}
        for name in names:
            self.files[name], theirs = shown(name, folder, rng)
            self.given |= theirs
        self.pipeline.set_progress_bar_config(disable=True)
        with torch.no_grad():
            frames = self.pipeline(
                prompt=PROMPT,
                negative_prompt=NEGATIVE,
                height=self.size[0],
                width=self.size[1],
                num_frames=FRAMES,
                num_inference_steps=STEPS,
                guidance_scale=self.guidance[0],
                guidance_scale_2=self.guidance[1] if len(self.guidance) > 1 else None,
                latents=torch.from_numpy(np.moveaxis(self.noise, -1, 1).copy()),
                output_type="np",
                **self.given,
            ).frames
        self.want = np.asarray(frames) * 2 - 1
        assert np.mean(np.abs(self.want) > 0.999) < 0.1 and self.want.std() > 0.1

    def settings(self) -> dict[str, Any]:
        """The settings of the same request to ours."""
        return dict(
            prompts=(PROMPT,),
            negative_prompt=NEGATIVE,
            height=self.size[0],
            width=self.size[1],
            num_frames=FRAMES,
            steps=STEPS,
            guidance=self.guidance,
            mesh={"data": 1},
            init_noise=str(self.folder / "noise.npy"),
            **self.files,
        )
