"""Programs run in this process as `python -m vdx.NAME` runs them, without starting one."""

import os
import runpy
import sys
import traceback
from typing import NamedTuple
from unittest import mock

from absl import app
from absl.testing import flagsaver

import vdx.evaluation.run  # noqa: F401  (libraries define flags as they are imported)


class Ended(NamedTuple):
    """How a program ended."""

    code: int
    out: str
    err: str  # with the stack trace, if there is one


def end(code: int):
    raise SystemExit(code)


def run_here(capsys, module: str, *args: str) -> Ended:
    """Run a program to its end. Its flags and its environment do not outlive it."""
    app.define_help_flags()
    capsys.readouterr()
    imported = sys.modules.pop(module, None)
    with (
        mock.patch.object(sys, "argv", [module, *args]),
        mock.patch.object(os, "_exit", end),
        mock.patch.dict(os.environ, {"GLIBC_TUNABLES": ""}),  # vdx.main does not start itself again
        flagsaver.flagsaver(),
    ):
        try:
            runpy.run_module(module, run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:  # what Python prints for it
            traceback.print_exc()
            code = 1
    if imported is not None:
        sys.modules[module] = imported
    return Ended(code, *capsys.readouterr())
