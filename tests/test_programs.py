"""Programs: which errors are for the user, and what Ctrl-C leaves."""

import dataclasses
from pathlib import Path

import jax
import pytest

from tests.command_line import end
from vdx import exits, programs
from vdx.config.build import ConfigError, fill
from vdx.data.workers import WorkerDied
from vdx.files import atomic_write


@dataclasses.dataclass
class Section:
    size: int = 1


def caught(raises) -> BaseException:
    with pytest.raises(Exception) as found:
        raises()
    return found.value


@pytest.mark.parametrize(
    ("raises", "is_one"),
    [
        (lambda: fill(Section, {"sizes": 1}, "section"), True),  # our own statement
        (lambda: fill(Section, None, "section"), False),  # AttributeError inside vdx
        (lambda: fill(int, {}, "section"), False),  # TypeError inside vdx
        (lambda: int("x"), False),  # not raised by vdx
        (lambda: exec("assert False"), False),
        (lambda: Path("/none").read_text(), True),
        (lambda: (_ for _ in ()).throw(MemoryError()), True),
        (lambda: (_ for _ in ()).throw(WorkerDied("x")), True),
        (lambda: (_ for _ in ()).throw(ConfigError("x")), True),  # of another process
        (lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x")), True),
        (lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: x")), False),
    ],
)
def test_errors_for_the_user(raises, is_one):
    assert programs.is_for_the_user(caught(raises)) is is_one


def test_bugs_pass(monkeypatch):
    monkeypatch.setattr("os._exit", end)
    for error in (AssertionError("bug"), TypeError("bug"), KeyError("bug"), ValueError("bug")):
        with pytest.raises(type(error), match="bug"), programs.exit_on_user_error("vdx"):
            raise error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), exits.INTERRUPTED, "vdx: interrupted."),
        (WorkerDied("worker"), exits.STUCK, "vdx: worker"),
        (
            OSError(28, "No space left on device", "a.mp4"),
            1,
            "vdx: a.mp4: No space left on device.",
        ),
        (MemoryError("all of it"), 1, "vdx: Out of memory: all of it"),
    ],
)
def test_how_errors_end_a_program(error, code, message, tmp_path, monkeypatch, capsys):
    """The output that was being written is removed, and an older one of its name stays."""
    monkeypatch.setattr("os._exit", end)
    out = tmp_path / "a.mp4"
    out.write_text("older")
    with (
        pytest.raises(SystemExit) as ended,
        programs.exit_on_user_error("vdx"),
        atomic_write(out) as part,
    ):
        part.write_text("half")
        raise error
    assert ended.value.code == code and message in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["a.mp4"] and out.read_text() == "older"
