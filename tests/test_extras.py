"""Extras: the message where a package is missing."""

import pytest

from vdx.config.build import ConfigError
from vdx.extras import import_extra


def test_an_installed_module_is_returned():
    assert import_extra("json.decoder", "prepare").JSONDecoder


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part"])
def test_a_missing_package_is_named_with_its_extra(module):
    with pytest.raises(ConfigError, match=r"no_such_package.*vdx\[prepare\]"):
        import_extra(module, "prepare")


def test_a_broken_package_is_no_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        import_extra("broken_package", "prepare")
