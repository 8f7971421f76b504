"""OpenCV, an extra of the installation, on one thread."""

from typing import Any

from vdx.extras import import_extra

__all__ = ["opencv"]


def opencv() -> Any:
    """Return the module cv2. Raises ConfigError if it is not installed.

    One thread: files are measured in parallel, one a process.
    """
    cv2 = import_extra("cv2", "prepare")
    cv2.setNumThreads(1)
    return cv2
