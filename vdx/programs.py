"""Programs: their flags, their help, and how mistakes end them.

Exit codes are in vdx.exits. A stack trace is a bug of vdx.
"""

import contextlib
import dis
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags

from vdx.compilation_cache import enable_compilation_cache
from vdx.config.loader import is_override
from vdx.exits import FAILED, INTERRUPTED, USAGE, exit_now, raise_interrupts

__all__ = ["exit_on_user_error", "is_for_the_user", "run_program", "start"]

FLAGS = flags.FLAGS
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in the message of XLA
HELP = {"-h", "-help", "--help", "--helpshort"}
PACKAGE = os.path.dirname(__file__) + os.sep


def run_program(
    main: Callable[..., None],
    define_flags: Callable[[], None],
    required: Sequence[str] = (),
    argument: str | None = None,
    takes_config: bool = False,
    passes_on: str | None = None,
) -> None:
    """Run an entry point: parse its flags, call `main`, report mistakes.

    required: flags without which the program cannot run. argument: the one argument without a
    flag, which `main` receives. takes_config: --config.KEY=VALUE is allowed. passes_on: the
    beginning of flags of a library, which `main` reads. --help prints the docstring of main's
    module and the flags that `define_flags` defines; --helpfull prints those of the libraries too.
    """
    raise_interrupts()
    module = main.__globals__
    command = f"python -m {module['__spec__'].name}"
    others = set(FLAGS)
    define_flags()
    own = sorted(set(FLAGS) - others)

    def parse(argv: Sequence[str]) -> list[str]:
        if HELP & set(argv):
            print(module["__doc__"].strip(), _list_flags(own), sep="\n\n")
            sys.exit(0)
        with exit_on_user_error(command):
            own_argv = [arg for arg in argv if not passes_on or not arg.startswith(passes_on)]
            rest = _parse_flags(own_argv, takes_config)
            _check_arguments(rest, argument)
            _check_required(required)
            return rest

    def run(argv: Sequence[str]) -> None:
        with exit_on_user_error(command):
            main(*argv[1:])

    app.run(run, flags_parser=parse)


def _list_flags(names: Sequence[str]) -> str:
    """Return a line for each flag: its name, its meaning and its default."""
    lines = ["Flags:"]
    for name in names:
        flag = FLAGS[name]
        text = f"--{'[no]' if flag.boolean else ''}{name}: {flag.help}"
        if flag.default not in (None, []):
            stated = str(flag.default_as_str).strip("'")
            text += f" [{stated}]"
        lines.append(flags.text_wrap(text, indent="      ", firstline_indent="  "))
    return "\n".join([*lines, "  --helpfull: Print the flags of the libraries too."])


def _parse_flags(argv: Sequence[str], takes_config: bool) -> list[str]:
    """Parse the flags and return what is no flag. Raises UsageError and flags.Error."""
    overrides = [arg for arg in argv if takes_config and is_override(arg)]
    for arg in overrides:
        if "=" not in arg:
            raise app.UsageError(f"{arg} has no value: write {arg}=VALUE.")
    rest: list[str] = FLAGS([arg for arg in argv if arg not in overrides])
    return rest


def _check_arguments(argv: Sequence[str], argument: str | None) -> None:
    """Raise UsageError for other arguments without a flag than the one expected."""
    given = list(argv[1:])
    if argument is None and given:
        raise app.UsageError(
            f"Unknown arguments {given}: options are written --name=value, in quotes if the value "
            "has spaces."
        )
    if argument is not None and len(given) != 1:
        raise app.UsageError(f"Expected one {argument}, got {given or 'none'}.")


def _check_required(names: Sequence[str]) -> None:
    """Raise UsageError for required flags that are not given, or are empty."""
    missing = [name for name in names if FLAGS[name].value in (None, "")]
    if missing:
        raise app.UsageError(
            "\n".join(f"--{name} is missing. {FLAGS[name].help}" for name in missing)
        )


def start() -> None:
    """Find the devices and enable the compilation cache. Raises UsageError."""
    try:
        jax.devices()
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise app.UsageError(
            f"JAX finds no device with JAX_PLATFORMS={platforms!r}: {error}"
        ) from error
    enable_compilation_cache()


@contextlib.contextmanager
def exit_on_user_error(command: str) -> Iterator[None]:
    """End the program with a message where a person can mend the cause of an error.

    command: the program, for the message about wrong flags. Everything else that is raised is a
    bug, and passes.
    """
    try:
        yield
    except KeyboardInterrupt:
        exit_now(INTERRUPTED, "interrupted.")
    except BrokenPipeError:  # whoever reads our output has gone, as in `... | head`
        os._exit(FAILED)
    except (app.UsageError, flags.Error) as error:
        exit_now(USAGE, f"{error}\n`{command} --help` lists the flags.")
    except Exception as error:
        if not is_for_the_user(error):
            raise
        exit_now(getattr(error, "exit_code", FAILED), _message(error))


def is_for_the_user(error: Exception) -> bool:
    """Return whether an error's message is for a person who can mend the cause.

    That is an error of the machine (files, memory), an error with an exit code, and a ValueError
    that vdx raises by a statement of its own. What Python or a library raises inside vdx is a bug.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        return OUT_OF_MEMORY in str(error)
    if isinstance(error, OSError | MemoryError) or hasattr(error, "exit_code"):
        return True
    if not isinstance(error, ValueError):
        return False
    if type(error).__module__.startswith("vdx."):  # also if a worker process raised it
        return True

    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    operation = dis.opname[code.co_code[trace.tb_lasti]]
    return code.co_filename.startswith(PACKAGE) and operation == "RAISE_VARARGS"


def _message(error: Exception) -> str:
    """Return the message of an error, with its notes, such as the name of a record."""
    text = str(error)
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        text = f"Out of memory: {text.splitlines()[0]}\nTake fewer or smaller clips at a time."
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}."
    return "\n".join([text, *getattr(error, "__notes__", [])])
