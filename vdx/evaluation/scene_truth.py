"""The target of a clip of a scene, from the exact state of the scene."""

from typing import Any

import numpy as np

from vdx.data.motion import motion_score
from vdx.data.scenes.signals import depth, flow
from vdx.data.scenes.world import CAMERAS, Scene
from vdx.data.signals import sparse_flow_hints

__all__ = ["scene_truth"]


def scene_truth(scene: Scene, times: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Return the target for `control_scores` of a clip with frames at these times."""
    times = np.asarray(times, np.float64)
    state = scene.state(times)[0]
    main = scene.objects[0]

    # The clip, and its exact flow.
    video = scene.render(times, height, width)
    fps = 1.0 / float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    dense = flow(scene, times, height, width)

    return {
        "video": video,
        "centre": state["center"] * (width, height),
        "angle": state["angle"],
        "depth": depth(scene, times, height, width),
        "pan": CAMERAS[scene.camera],
        "fps": fps,
        "flow": sparse_flow_hints(dense, 0, np.random.default_rng(0)),
        "actions": main.actions(times),
        "motion": motion_score(video, fps),
        "words": main.motion,
        "colour": main.colour,
        "shape": main.shape,
    }
