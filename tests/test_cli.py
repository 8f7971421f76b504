"""Flags as values: what parses, and the message for what does not."""

import pytest
from absl.app import UsageError

from vdx import cli


def test_flags_as_values():
    assert cli.parse_mesh(None) is None
    assert cli.parse_mesh("fsdp=4,tensor=2") == {"fsdp": 4, "tensor": 2}
    assert cli.parse_guidance("4") == 4.0
    assert cli.parse_guidance("4,3") == (4.0, 3.0)
    assert cli.parse_signal_guidance("depth=2,flow=1.5") == {"depth": 2.0, "flow": 1.5}
    assert cli.parse_control_maps("depth=a.npy,pose=b.mp4") == {"depth": "a.npy", "pose": "b.mp4"}
    assert cli.parse_control_maps(None) == {}
    assert cli.parse_list("a.png,b.png") == ("a.png", "b.png")


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (cli.parse_mesh, "fsdp:4", r"--mesh=fsdp:4 is not like fsdp=4,tensor=2"),
        (cli.parse_guidance, "high", r"--guidance=high is not a number, or two"),
        (cli.parse_signal_guidance, "depth", r"--signal_guidance=depth is not like depth=2"),
        (cli.parse_control_maps, "deph=x.npy", r"--control=deph=x.npy is not like depth=FILE"),
    ],
)
def test_flags_that_do_not_parse(parse, text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)
