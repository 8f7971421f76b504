"""Apache Beam: the same bytes as the local runner."""

import importlib.util
import sys

import pytest

from tests.kill_prepare import start, tree, write_footage
from vdx.config.build import ConfigError
from vdx.data.preparation.runner import Beam

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None


@pytest.mark.slow
@pytest.mark.skipif(not HAS_BEAM, reason="needs the extra beam")
def test_beam_gives_the_same_bytes(tmp_path):
    write_footage(tmp_path / "in", 3, frames=18)
    log = tmp_path / "log"
    assert start(tmp_path / "in", tmp_path / "local", log).wait() == 0, log.read_text()
    flags = ("--runner=beam", "--beam.runner=DirectRunner")
    assert start(tmp_path / "in", tmp_path / "beam", log, *flags).wait() == 0, log.read_text()
    assert tree(tmp_path / "beam") == tree(tmp_path / "local")


def test_without_beam_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)  # the import fails as if it were absent
    with pytest.raises(ConfigError, match=r"vdx\[beam\]"):
        Beam((), tmp_path).map(str, [1], "look")
