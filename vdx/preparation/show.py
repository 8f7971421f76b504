"""A page with the clips that cached latents decode to, and their captions.

What the page shows is all that training sees of a clip: its latents, decoded by the VAE.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jax
import numpy as np
from tqdm import tqdm

from vdx.config.build import ConfigError
from vdx.data.sources import Records
from vdx.files import atomic_write
from vdx.generate.decode import Decoder
from vdx.generate.pretrained import PIXELS
from vdx.generate.pretrained_networks import PretrainedNetworks
from vdx.generate.video_io import to_uint8, write_video
from vdx.interop.encoder_check import check_encoders
from vdx.models.vae.image_vae import ImageVAE
from vdx.parallel import MeshSpec
from vdx.preparation.encoder_model import open_encoders

__all__ = ["show_latents"]

MOST = 48  # clips of a page, spread evenly over the data set
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; }}
main {{ display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }}
figure {{ margin: 0; }} video {{ width: 100%; }} small {{ color: #667; overflow-wrap: anywhere; }}
</style></head><body><h1>{title}</h1><p>{about}</p>
<main>
{figures}
</main></body></html>
"""


class Entry(NamedTuple):
    """A record of the page."""

    number: int  # in the data set
    row: Mapping[str, Any]  # its features


def show_latents(data: Path, weights: Path, page: Path) -> None:
    """Write a page of decoded clips, its videos in a folder next to it.

    data: --out of vdx.prepare, or a data set of latents. weights: the pretrained model whose VAE
    made them. Raises ConfigError, WeightsError for another VAE, and ValueError for other data.
    """
    source = Records(str(data), split="all")
    if "latents" not in source.rows[0]:
        raise ConfigError(f"{data} holds clips and no latents: see --until=latents.")
    check_encoders(str(weights), {"vae": (source.metadata.get("weights") or {}).get("vae", "")})

    model = open_encoders(weights, "float32")
    mesh = MeshSpec().make(jax.local_devices())
    media = page.with_name(f"{page.stem}_media")
    figures = []
    with jax.set_mesh(mesh):
        decode = _decoder(PretrainedNetworks(model.components, mesh))
        places = np.linspace(0, len(source) - 1, min(MOST, len(source))).astype(int)
        for record in tqdm(list(_rows(source, places.tolist())), desc="decode", unit="clip"):
            latents = np.asarray(record.row["latents"], np.float32)
            frames = decode(latents)
            file = media / f"{record.number:06d}.mp4"
            write_video(file, frames, float(record.row["fps"]))
            figures.append(_figure(record.row, frames.shape, f"{media.name}/{file.name}"))
    _write(page, data, figures, len(source))


def _decoder(networks: PretrainedNetworks) -> Callable[[np.ndarray], np.ndarray]:
    """Read the VAE; return decode(latents [t h w c]) -> frames uint8 [t h w 3]."""
    params = networks.load("vae")
    vae = networks.components["vae"].module
    if isinstance(vae, ImageVAE):
        decode = networks.compile_call("vae", lambda apply, x: apply(x, method="decode"))
        return lambda latents: to_uint8(decode(params, latents))

    def pieces(latents: np.ndarray) -> np.ndarray:
        _, height, width, _ = latents.shape
        chunk = max(1, PIXELS // (vae.rates.side**2 * height * width))
        return np.concatenate(list(decoder_of(chunk)(latents)))

    @functools.cache
    def decoder_of(chunk: int) -> Decoder:
        return Decoder(vae, params, chunk)

    return pieces


def _rows(source: Records, indices: Sequence[int]) -> Iterator[Entry]:
    """Yield records with their features as the data set has them."""
    for index in indices:
        yield Entry(index, source.rows[index])


def _figure(row: Mapping[str, Any], shape: Sequence[int], file: str) -> str:
    """Return a clip and its caption as HTML."""
    caption = escape(_text(row["caption"])) or "<em>no caption</em>"
    frames, height, width = shape[:3]
    facts = f"{escape(_text(row['key']))}; {frames} frames of {height}x{width}, {row['fps']:g} fps"
    if "motion" in row:
        facts += f", motion {float(row['motion']):.3g}"
    return (
        f'<figure><video src="{quote(file)}" controls loop muted playsinline></video>'
        f"<figcaption>{caption}<br><small>{facts}</small></figcaption></figure>"
    )


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _write(page: Path, data: Path, figures: Sequence[str], count: int) -> None:
    """Write the page."""
    about = f"{len(figures)} of {count} records of {escape(str(data))}, decoded by the VAE."
    html = PAGE.format(title="Cached latents", about=about, figures="\n".join(figures))
    with atomic_write(page) as part:
        part.write_bytes(html.encode(errors="backslashreplace"))
    print(f"{page}: {len(figures)} of {count} records")
