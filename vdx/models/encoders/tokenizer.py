"""The interface of tokenizers, and the report of what they cut."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from vdx.files import warn_once

__all__ = ["Tokenizer", "report_cut", "report_lengths"]


@runtime_checkable
class Tokenizer(Protocol):
    """A host function caption -> (ids or features, mask) that cuts long captions."""

    @property
    def kept(self) -> int:
        """The units of a caption that are kept."""

    @property
    def unit(self) -> str:
        """The name of the units, in the plural."""

    def count(self, caption: str) -> int:
        """Return the number of units of a caption, before it is cut."""

    def __call__(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids [l] or features [l d], mask [l])."""


def report_cut(what: str, texts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Log once how many texts a tokenizer cuts and how many are blank, if any.

    what: the name of the texts, in the plural.
    """
    known = list(texts)
    blank = sum(not text.strip() for text in known)
    if blank:
        warn_once(f"{blank} of {len(known)} {what} are blank: they count as the empty text.")
    report_lengths(what, [tokenizer.count(text) for text in known], tokenizer.kept, tokenizer.unit)


def report_lengths(what: str, lengths: Sequence[int], kept: int, unit: str) -> None:
    """Log once how many lengths of texts exceed `kept` units, if any."""
    cut = sum(length > kept for length in lengths)
    if cut:
        warn_once(
            f"{cut} of {len(lengths)} {what} are longer than the {kept:,} {unit} that the text "
            f"encoder reads, and are cut; the longest has {max(lengths):,}."
        )
