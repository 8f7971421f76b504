"""The convolution mixer against the loop that defines a convolution."""

import numpy as np

from tests.models.test_convolution import X, conv_by_loop
from vdx.models.mixers.conv import ConvMixer
from vdx.models.shapes import init_shapes


def test_a_separable_mixer_is_one_with_the_product_of_its_kernels(randomise):
    """Space, then time, as one 3D kernel; edges are the same beyond either."""
    apart, whole = (ConvMixer(1, separable=s, padding="edge") for s in (True, False))
    p = randomise(init_shapes(apart, X, None))
    space, time = p["depthwise_space"], p["depthwise_time"]
    joint = {
        "kernel": time["kernel"] * space["kernel"],
        "bias": time["bias"] + space["bias"] * time["kernel"].sum((0, 1, 2, 3)),
    }
    want = apart.apply({"params": p}, X, None)
    got = whole.apply({"params": {"depthwise": joint, "out": p["out"]}}, X, None)
    np.testing.assert_allclose(got, want, atol=2e-6)
    clip = conv_by_loop(joint, X, (3, 3, 3), (1, 1, 1), False, "edge", True)
    np.testing.assert_allclose(got, clip @ p["out"]["kernel"] + p["out"]["bias"], atol=5e-6)
