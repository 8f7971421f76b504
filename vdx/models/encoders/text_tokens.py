"""Prompts for pretrained text encoders: cleaned, as token ids of a few lengths, features padded.

Runs on the host; the tokenizers are those that lie beside the weights.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vdx.config.build import ConfigError


def clean_prompt(text: str) -> str:
    """HTML entities twice undone, every run of white space one space, none at the ends.

    The cleaning of Wan, except that Wan first calls `ftfy.fix_text` (and diffusers does where
    ftfy is installed), which repairs broken encodings and straightens quotation marks. Here a
    prompt means the same on every machine; call it yourself for prompts that need it.
    """
    text = html.unescape(html.unescape(text)).strip()
    # Python's white space has four control characters more than that of the reference.
    return re.sub(r"[^\S\x1c-\x1f]+", " ", text).strip()


class PromptTokenizer:
    """prompts -> (ids int32 [b l], mask bool [b l]) by the tokenizer in `folder`.

    l is the smallest of `lengths` that holds the longest prompt, so that an encoder is compiled
    at most once for each; longer prompts are cut to the last, their end token kept. The default
    is Wan's; CLIP reads lengths (77,) and is not given cleaned prompts. Raises ConfigError if
    there is no tokenizer in `folder`.
    """

    def __init__(
        self, folder: str | Path, lengths: Sequence[int] = (64, 128, 256, 512), clean: bool = True
    ):
        from transformers import AutoTokenizer  # slow to import, and only the host needs it

        self.lengths, self.clean = sorted(lengths), clean
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"No tokenizer can be read from {folder}: {error}. It is the folder "
                "`tokenizer` beside the model's weights."
            ) from error

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        texts = [clean_prompt(p) if self.clean else p for p in prompts]
        rows = self._tokenizer(texts, truncation=True, max_length=self.lengths[-1])["input_ids"]
        longest = max(map(len, rows))
        length = next(n for n in self.lengths if n >= longest)
        ids = np.full((len(rows), length), self._tokenizer.pad_token_id, np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return ids, np.arange(length) < np.array([len(r) for r in rows])[:, None]
