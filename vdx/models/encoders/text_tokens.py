"""Prompts for pretrained text encoders, as padded token ids.

Runs on the host. The tokenizers come with the weights.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np

from vdx.config.build import ConfigError
from vdx.models.encoders.tokenizer import report_lengths
from vdx.types import Bool, Int


def clean_prompt(text: str) -> str:
    """Repair broken text, undo HTML entities twice and normalise white space.

    `ftfy.fix_text` repairs wrong decoding, straightens quotation marks and splits ligatures. Every
    run of white space becomes one space, and there is none at the ends. This is Wan's cleaning.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    # Python's white space has four control characters more than that of the reference.
    return re.sub(r"[^\S\x1c-\x1f]+", " ", text).strip()


class PromptTokenizer:
    """Prompts to token ids and their mask, by a tokenizer from a folder.

    A batch has the smallest of a few lengths that holds its longest prompt, so that an encoder is
    compiled at most once for each. Longer prompts are cut to the largest, with their end token,
    and reported.
    """

    def __init__(
        self, folder: str | Path, lengths: Sequence[int] = (64, 128, 256, 512), clean: bool = True
    ) -> None:
        """Read the tokenizer in `folder`. Raises ConfigError if there is none.

        lengths: of token ids; the default is Wan's, and CLIP needs (77,). clean: apply
        `clean_prompt`; CLIP's prompts are not cleaned.
        """
        from transformers import AutoTokenizer  # slow to import, and only the host needs it

        self.lengths = sorted(lengths)
        self.clean = clean
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"No tokenizer can be read from {folder}: {error}. It is the folder "
                "`tokenizer` next to the model's weights."
            ) from error

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Return (ids int32, mask), padded; the mask is True on tokens."""
        texts = [clean_prompt(p) if self.clean else p for p in prompts]
        longest = self.lengths[-1]
        rows = self._tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        sizes = np.array([len(row) for row in rows])
        if sizes.max() == longest:
            whole = self._tokenizer(texts, verbose=False)["input_ids"]
            unit = "tokens, special ones included,"
            report_lengths("prompts", list(map(len, whole)), longest, unit)
        length = next(n for n in self.lengths if n >= sizes.max())

        ids = np.full((len(rows), length), self._tokenizer.pad_token_id, np.int32)
        for padded, tokens in zip(ids, rows, strict=True):
            padded[: len(tokens)] = tokens
        return ids, np.arange(length) < sizes[:, None]
