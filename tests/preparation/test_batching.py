"""Batches through a network: rows, and what happens when memory runs out."""

import jax
import numpy as np
import pytest

from vdx.preparation.batching import BatchRunner


class Network:
    """Doubles its rows; a device has memory for some of them."""

    def __init__(self, most: int):
        self.most = most
        self.sizes: list[int] = []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return 2 * x


def test_every_batch_has_one_size():
    network = Network(most=6)
    x = np.arange(20.0).reshape(10, 2)
    np.testing.assert_array_equal(BatchRunner(3, parts=2)(network, x), 2 * x)
    assert network.sizes == [6, 6]


def test_the_batch_is_halved_when_memory_runs_out():
    network = Network(most=5)
    lines: list[str] = []
    run = BatchRunner(8, parts=2, log=lines.append)
    x = np.arange(20.0).reshape(10, 2)
    np.testing.assert_array_equal(run(network, x), 2 * x)
    assert network.sizes == [16, 8, 4, 4, 4]
    assert run.rows == 4  # from here on
    assert [line.split(": ")[0] for line in lines] == ["Out of memory"] * 2


def test_other_errors_and_a_single_row_are_raised():
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        BatchRunner(2, parts=1)(Network(most=0), np.zeros((2, 1)))

    def broken(x):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    run = BatchRunner(4, parts=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        run(broken, np.zeros((2, 1)))
    assert run.rows == 4
