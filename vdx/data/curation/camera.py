"""Motion of the camera between two frames, from their optical flow."""

import numpy as np

from vdx.data.curation.opencv import opencv

__all__ = ["camera_shift"]

STEP = 5  # pixels between the points that are fitted
TEXTURE = 4.0  # levels a pixel; flow at points of less texture is a guess
FEWEST = 12  # points
INLIER = 0.5  # pixels from the motion of the camera
SIDE = 1 / 8  # of a frame at each side is not used: what leaves the image has no flow


def camera_shift(flow: np.ndarray, image: np.ndarray) -> tuple[float, float]:
    """Return the shift of the image's centre in pixels (x, y); NaN without texture.

    A similarity (shift, rotation, zoom) is fitted to the flow by RANSAC, so objects that move by
    themselves do not count. flow: float32 [h w 2]. image: uint8 [h w], the first frame.
    """
    cv2 = opencv()
    height, width = image.shape
    top = max(1, int(SIDE * height))
    left = max(1, int(SIDE * width))
    rows, columns = np.mgrid[top : height - top : STEP, left : width - left : STEP]
    rows = rows.ravel()
    columns = columns.ravel()
    if len(rows) < FEWEST:
        return float("nan"), float("nan")

    levels = image.astype(np.float32)
    slopes_x = np.abs(cv2.Sobel(levels, cv2.CV_32F, 1, 0, scale=0.125))
    slopes_y = np.abs(cv2.Sobel(levels, cv2.CV_32F, 0, 1, scale=0.125))
    texture = cv2.blur(np.hypot(slopes_x, slopes_y), (5, 5))[rows, columns]
    # A dark scene has less texture at the same certainty.
    used = texture > min(TEXTURE, max(0.5, float(np.median(texture))))
    if used.sum() < FEWEST:
        return float("nan"), float("nan")

    points = np.stack([columns, rows], axis=1)[used].astype(np.float32)
    moved = points + flow[rows[used], columns[used]]
    matrix, _ = cv2.estimateAffinePartial2D(
        points, moved, method=cv2.RANSAC, ransacReprojThreshold=INLIER, maxIters=200
    )
    if matrix is None:
        return float("nan"), float("nan")
    centre = np.array([width / 2, height / 2])
    shift = matrix[:, :2] @ centre + matrix[:, 2] - centre
    return float(shift[0]), float(shift[1])
