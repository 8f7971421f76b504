"""Captions of files of footage."""

from typing import NamedTuple

__all__ = ["Caption"]


class Caption(NamedTuple):
    """The caption of a file: one text, or texts by time."""

    text: str | None = None
    cues: tuple[tuple[float, float, str], ...] = ()  # (start, end, text), seconds

    def at(self, start: float, end: float) -> str | None:
        """Return the caption of a clip: the texts whose times overlap it, in order."""
        if not self.cues:
            return self.text
        texts: list[str] = []
        for cue_start, cue_end, text in self.cues:
            if cue_start < end and cue_end > start and text not in texts[-1:]:
                texts.append(text)
        return " ".join(texts) if texts else None
