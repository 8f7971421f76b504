"""Tables of keys, read both ways, and every way in which a file can disagree."""

import numpy as np
import pytest

from vdx.interop.keymap import CONV, LINEAR, Row, WeightsError, assign, export, gather, patches

ROWS = (
    Row("blocks.{i}.to_q.weight", "layers/q/kernel[{i}]", LINEAR),
    Row("blocks.{i}.to_q.bias", "layers/q/bias[{i}]"),
    Row("conv.weight", "conv/kernel", CONV),
    Row("patch.weight", "patch/kernel", patches((1, 2, 2))),
    Row("down.{i}.{j}.bias", "down_{i}/norm_{j}/bias"),
    Row("unused.{i}", None),
    Row("", "text/null"),
)
RNG = np.random.default_rng(0)
THEIRS = {
    **{f"blocks.{i}.to_q.weight": RNG.normal(size=(4, 3)).astype(np.float32) for i in range(12)},
    **{f"blocks.{i}.to_q.bias": RNG.normal(size=4).astype(np.float32) for i in range(12)},
    "conv.weight": RNG.normal(size=(5, 2, 3, 3, 3)).astype(np.float32),
    "patch.weight": RNG.normal(size=(6, 2, 1, 2, 2)).astype(np.float32),
    "down.0.1.bias": RNG.normal(size=7).astype(np.float32),
}
ABSTRACT = {
    "layers": {
        "q": {"kernel": np.zeros((12, 3, 4), np.float32), "bias": np.zeros((12, 4), np.float32)}
    },
    "conv": {"kernel": np.zeros((3, 3, 3, 2, 5), np.float32)},
    "patch": {"kernel": np.zeros((8, 6), np.float32)},
    "down_0": {"norm_1": {"bias": np.zeros(7, np.float32)}},
    "text": {"null": np.zeros(3, np.float16)},
}


def test_there_and_back():
    ours = gather(THEIRS.get, [*THEIRS, "unused.3"], ABSTRACT, ROWS)
    np.testing.assert_array_equal(
        ours["layers"]["q"]["kernel"][11], THEIRS["blocks.11.to_q.weight"].T
    )
    np.testing.assert_array_equal(ours["text"]["null"], np.zeros(3, np.float16))
    back = dict(export(ours, ROWS))
    assert set(back) == set(THEIRS)
    for key, value in THEIRS.items():
        np.testing.assert_array_equal(back[key], value)


def test_layouts_compute_the_same():
    x = RNG.normal(size=(1, 4, 6, 2))  # t h w c
    tiles = x.reshape(1, 2, 2, 3, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(1, 2, 3, 8)
    ours = tiles @ patches((1, 2, 2)).ours(THEIRS["patch.weight"])
    conv = np.einsum(
        "thiwjc,dcij->thwd", x.reshape(1, 2, 2, 3, 2, 2), THEIRS["patch.weight"][:, :, 0]
    )
    np.testing.assert_allclose(ours, conv, rtol=1e-12)
    assert CONV.ours(THEIRS["conv.weight"])[2, 1, 0, 1, 4] == THEIRS["conv.weight"][4, 1, 2, 1, 0]


def test_all_that_is_wrong_is_listed_at_once():
    keys = [k for k in THEIRS if k not in ("blocks.3.to_q.bias", "conv.weight")]
    with pytest.raises(WeightsError) as error:
        assign([*keys, "blocks.12.to_q.bias", "strange", "down.1.1.bias"], ABSTRACT, ROWS)
    for part in (
        "strange: no such parameter",
        "blocks.12.to_q.bias: layers/q/bias has 12 layers",
        "this model has no down_1/norm_1/bias",
        "layers/q/bias: layers [3]",
        "conv/kernel (3, 3, 3, 2, 5): not in the file",
    ):
        assert part in str(error.value), part


def test_two_keys_for_one_parameter():
    rows = (*ROWS, Row("legacy.weight", "conv/kernel", CONV))
    with pytest.raises(WeightsError, match=r"legacy.weight: conv/kernel is already filled"):
        assign([*THEIRS, "legacy.weight"], ABSTRACT, rows)


@pytest.mark.parametrize(("order", "key"), [((0, 1), "down.0.bias"), ((1, 0), "legacy")])
def test_the_first_row_names_a_parameter(order, key):
    both = Row("down.{i}.bias", "down_{i}/bias"), Row("legacy", "down_0/bias")
    params = {"down_0": {"bias": np.ones(2)}}
    assert [k for k, _ in export(params, [both[i] for i in order])] == [key]


def test_a_shape_that_differs():
    wrong = {**THEIRS, "blocks.2.to_q.weight": np.zeros((4, 5), np.float32)}
    with pytest.raises(WeightsError, match=r"blocks.2.to_q.weight: is \(5, 4\) for .* \(3, 4\)"):
        gather(wrong.get, wrong, ABSTRACT, ROWS)


def test_a_parameter_without_a_row():
    with pytest.raises(WeightsError, match="other/kernel: no row"):
        dict(export({**ABSTRACT, "other": {"kernel": np.zeros(3)}}, ROWS))
