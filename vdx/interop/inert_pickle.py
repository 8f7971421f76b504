"""Pickles, read as data: nothing is imported, called or changed.

A pickle is a program. It may name any function and call it, and it may set attributes of what it
has named. Here a name, a call and a reference to what is outside of the pickle become tuples, and
the reader of a file decides what they mean. Dictionaries and lists are the only objects that the
program can change, and it can reach none but its own.

https://docs.python.org/3/library/pickletools.html
"""

import pickletools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from vdx.files import excerpt

# Bounds. A tensor of a state dict takes 40 opcodes and 200 bytes.
MOST_OPCODES = 2_000_000  # each makes at most one object
MOST_BYTES = 1 << 25
ORDERED_DICT = ("collections", "OrderedDict")
KEYS = (str, int, float, bool, type(None))  # others may take forever to hash


class Name(NamedTuple):
    """The name of a class or a function."""

    module: str
    name: str


class Call(NamedTuple):
    """The result of a call, which was not made."""

    name: Name
    arguments: tuple[Any, ...]


class Reference(NamedTuple):
    """An object that is not in the pickle."""

    fields: Any


class _Machine:
    """The state of the machine for which a pickle is the program."""

    def __init__(self, names: Collection[Name]) -> None:
        """names: those that the pickle may contain."""
        self.names = names
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}

    def pop_to_mark(self) -> list[Any]:
        """Return what is above the last mark, and remove it."""
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def pop(self, count: int) -> tuple[Any, ...]:
        """Return the last entries of the stack, and remove them."""
        if len(self.stack) < count:
            raise ValueError("its stack is empty")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return items

    def push_name(self, module: Any, name: Any) -> None:
        """Push a name. Raises ValueError for an unknown one."""
        if (module, name) not in self.names:
            text = excerpt(f"{module}.{name}")[1:-1]
            raise ValueError(f"it names {text}, which no array needs")
        self.stack.append(Name(module, name))


def load(content: bytes, names: Collection[Name]) -> Any:
    """Return the value of a pickle.

    names: those that it may contain; a call of collections.OrderedDict is a dictionary. Raises
    ValueError for another name, for opcodes that no dictionary of arrays needs, and beyond the
    bounds. A program that is no pickle may raise any other exception.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"its pickle has more than {MOST_BYTES:,} bytes")

    machine = _Machine(names)
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if number == MOST_OPCODES:
            raise ValueError(f"its pickle has more than {MOST_OPCODES:,} opcodes")
        if opcode.name not in OPCODES:
            raise ValueError(f"its pickle has the opcode {opcode.name}, which no array needs")
        OPCODES[opcode.name](machine, argument)

    if len(machine.stack) != 1:
        raise ValueError("its pickle does not end with one value")
    return machine.stack[0]


def _set_items(machine: _Machine, items: list[Any]) -> None:
    """Add keys and values to the dictionary on the stack."""
    target = machine.stack[-1]
    if type(target) is not dict or len(items) % 2:
        raise ValueError("its pickle changes an object that is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in KEYS:
            raise ValueError("a key of a dictionary is neither a text nor a number")
        if key in target:
            raise ValueError(f"the key {excerpt(str(key))} stands twice in one dictionary")
        target[key] = value


def _append(machine: _Machine, items: list[Any]) -> None:
    """Append values to the list on the stack."""
    target = machine.stack[-1]
    if type(target) is not list:
        raise ValueError("its pickle changes an object that is no list")
    target.extend(items)


def _reduce(machine: _Machine, _: Any) -> None:
    """Call: (name, arguments) -> the call."""
    name, arguments = machine.pop(2)
    if type(name) is not Name or type(arguments) is not tuple:
        raise ValueError("its pickle calls what is no function")
    if name != ORDERED_DICT:
        machine.stack.append(Call(name, arguments))
    elif arguments:
        raise ValueError("its pickle makes a dictionary from other objects")
    else:
        machine.stack.append({})


def _build(machine: _Machine, _: Any) -> None:
    """Leave out the attributes of a dictionary: torch gives its own `_metadata`."""
    target, _state = machine.pop(2)
    if type(target) is not dict:
        raise ValueError("its pickle sets attributes of an object")
    machine.stack.append(target)


def _push(machine: _Machine, value: Any) -> None:
    """Push a value."""
    machine.stack.append(value)


def _nothing(machine: _Machine, _: Any) -> None:
    """Do nothing."""


def _put(machine: _Machine, index: int) -> None:
    """Remember the last entry of the stack."""
    machine.memo[index] = machine.stack[-1]


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    """Return the opcode that makes a tuple of the last entries of the stack."""
    return lambda machine, _: machine.stack.append(machine.pop(count))


# name in pickletools -> opcode(machine, argument)
OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "STOP": _nothing,
    # Plain values.
    "NONE": lambda machine, _: _push(machine, None),
    "NEWTRUE": lambda machine, _: _push(machine, True),
    "NEWFALSE": lambda machine, _: _push(machine, False),
    "BININT": _push,
    "BININT1": _push,
    "BININT2": _push,
    "LONG1": _push,
    "BINFLOAT": _push,
    "SHORT_BINUNICODE": _push,
    "BINUNICODE": _push,
    "SHORT_BINBYTES": _push,
    "BINBYTES": _push,
    # Containers.
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "EMPTY_TUPLE": lambda machine, _: _push(machine, ()),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.pop_to_mark())),
    "EMPTY_LIST": lambda machine, _: _push(machine, []),
    "APPEND": lambda machine, _: _append(machine, list(machine.pop(1))),
    "APPENDS": lambda machine, _: _append(machine, machine.pop_to_mark()),
    "EMPTY_DICT": lambda machine, _: _push(machine, {}),
    "SETITEM": lambda machine, _: _set_items(machine, list(machine.pop(2))),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.pop_to_mark()),
    "POP": lambda machine, _: _nothing(machine, machine.pop(1)),
    # Values that stand in several places.
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    "BINGET": lambda machine, index: _push(machine, machine.memo[index]),
    "LONG_BINGET": lambda machine, index: _push(machine, machine.memo[index]),
    # Names, calls, references and attributes.
    "GLOBAL": lambda machine, text: machine.push_name(*text.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.push_name(*machine.pop(2)),
    "REDUCE": _reduce,
    "BINPERSID": lambda machine, _: _push(machine, Reference(*machine.pop(1))),
    "BUILD": _build,
}
