"""Identity drift: a subject whose colours change while the clip runs."""

import dataclasses
from typing import ClassVar

import numpy as np

from vdx.config.ranges import Count
from vdx.evaluation.consistency import ConsistencyEvaluator
from vdx.metrics.temporal_consistency import identity_drift
from vdx.metrics.tracking import foreground

__all__ = ["IdentityDrift", "subject_masks"]

LEAST_SHARE = 0.75  # of the frames must show one subject, or the clip is inconclusive
LEAST_PIXELS = 12  # of a subject, before its edge is left out
LARGEST = 0.5  # share of a frame; a larger "subject" is a background that was not recognized
COMPACT = 0.6  # 1 for a disc; single objects of scenes have 0.65 and more, two together less


@dataclasses.dataclass(frozen=True)
class IdentityDrift(ConsistencyEvaluator):
    """Drift of the subject and motion of clips drawn for validation captions.

    The subject is one object over a plain or known background at rest. A clip in which no
    subject can be found is inconclusive, never good. Scores: `clips`; `drift` from 0 to 1, the
    mean over the conclusive clips; `motion`, the mean motion score of all clips; `conclusive`,
    the share of conclusive clips; the same for the data's own clips under `true`. A mean over
    no clip is NaN: inconclusive.
    """

    clips: Count = 24  # clips without a subject that can be followed are left out of the mean

    name: ClassVar[str] = "identity_drift"
    title: ClassVar[str] = "Identity drift"
    about: ClassVar[str] = (
        "Change of the colours of the subject, from 0 (none) to 1; lower is better. A frozen clip "
        "does not drift: read it together with the motion score. Clips whose subject cannot be "
        "followed are inconclusive."
    )
    score: ClassVar[str] = "drift"
    label: ClassVar[str] = "identity drift (0 to 1)"

    def score_clip(self, video: np.ndarray) -> float | None:
        """Return the drift of a clip from 0 to 1."""
        masks = subject_masks(video)
        if masks is None:
            return None
        value, share = identity_drift(video, masks)
        return value if share >= LEAST_SHARE else None


def subject_masks(video: np.ndarray) -> np.ndarray | None:
    """Find the subject, bool [t h w], of a clip uint8 [t h w 3]; None if it has none.

    The subject is the one compact region that differs from a plain or known background at rest,
    in any colour, without its edge, which mixes with the background.
    """
    masks = foreground(video)
    for mask in masks:
        if not _is_one_subject(mask):
            mask[:] = False
    masks = _eroded(masks)
    return masks if masks.any() else None


def _is_one_subject(mask: np.ndarray) -> bool:
    """Return whether a region [h w] is one compact piece."""
    y, x = np.nonzero(mask)
    if not LEAST_PIXELS <= len(x) <= LARGEST * mask.size:
        return False
    # The compactness area / (2 pi variance) is 1 for a disc.
    return len(x) >= COMPACT * 2 * np.pi * (x.var() + y.var())


def _eroded(masks: np.ndarray) -> np.ndarray:
    """Leave out the pixels of regions [t h w] that have a neighbour outside."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    vertical = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1]
    horizontal = padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return masks & vertical & horizontal
