"""Damage to honest files: flipped bits, cuts, insertions, and values that a format cannot mean.

Every function takes a numpy generator first, so that a case is its number and nothing else.
"""

import itertools
import json
import pickle
import pickletools
import zipfile
from io import BytesIO

EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
# Values in place of any value of a JSON file.
VALUES = [
    None,
    True,
    -1,
    0,
    10**9,
    2**63,
    10**30,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "\ud800",
    "a" * 10_000,
    "../../etc/passwd",
    "\0",
    [],
    {},
    [[]],
    {"name": "x"},
    [0] * 1000,
]
# Opcodes that no state dict needs, with arguments where they take some.
OPCODES = [
    pickle.BUILD,
    pickle.REDUCE,
    pickle.NEWOBJ,
    pickle.POP,
    pickle.POP_MARK,
    pickle.DUP,
    pickle.SETITEM,
    pickle.SETITEMS,
    pickle.APPENDS,
    pickle.TUPLE,
    pickle.TUPLE2,
    pickle.EMPTY_DICT,
    pickle.MARK,
    pickle.NONE,
    pickle.BINPERSID,
    pickle.STACK_GLOBAL,
    pickle.BINGET + b"\0",
    pickle.BINGET + b"\1",
    pickle.BINPUT + b"\0",
    pickle.EXT1 + b"\1",
    pickle.LONG4 + b"\xff\xff\xff\x7f",
    pickle.BININT + b"\xff\xff\xff\xff",
    pickle.LONG1 + b"\x09" + b"\xff" * 8 + b"\x7f",
    pickle.GLOBAL + b"os\nsystem\n",
    pickle.GLOBAL + b"torch\nBFloat16Storage\n",
    pickle.GLOBAL + b"collections\nOrderedDict\n",
    pickle.BINUNICODE + b"\xff\xff\xff\x7f",
]


def pick(rng, options):
    """Return one of a list."""
    return options[int(rng.integers(len(options)))]


def position(rng, content, alignment=1):
    """Return an index of a byte: in half of the cases of the header, where formats are fragile."""
    end = min(len(content), 400) if rng.integers(2) else len(content)
    return int(rng.integers(max(end, 1))) // alignment * alignment


def flip(rng, content):
    """Flip one to eight bits."""
    damaged = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        if damaged:
            damaged[position(rng, damaged)] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def flip_one(rng, content):
    """Flip one bit anywhere."""
    damaged = bytearray(content)
    damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def cut(rng, content):
    """Leave the end out."""
    return content[: position(rng, content)]


def remove(rng, content):
    """Leave bytes in the middle out."""
    start = position(rng, content)
    return content[:start] + content[start + int(rng.integers(1, 40)) :]


def insert(rng, content):
    """Insert random bytes, or bytes from elsewhere in the file."""
    start = position(rng, content)
    source = position(rng, content)
    more = rng.bytes(int(rng.integers(1, 40)))
    if rng.integers(2):
        more = content[source : source + 200]
    return content[:start] + more + content[start:]


def number(rng, content):
    """Write an extreme number in place of two, four or eight bytes."""
    size = pick(rng, [2, 4, 8])
    start = position(rng, content, alignment=pick(rng, [1, 2, 4]))
    order = pick(rng, ["little", "big"])
    value = (pick(rng, EXTREMES) % 256**size).to_bytes(size, order)
    return content[:start] + value + content[start + size :]


BYTES = [flip, flip, cut, remove, insert, number]


def damage(rng, content):
    """Damage bytes in one of all ways, sometimes twice."""
    for _ in range(rng.integers(1, 3)):
        content = pick(rng, BYTES)(rng, content)
    return content


def mutate_value(rng, value):
    """Return a JSON value with one value, name or entry changed."""
    if isinstance(value, dict) and value and rng.integers(10):
        name = pick(rng, list(value))
        kind = rng.integers(12)
        rest = {k: v for k, v in value.items() if k != name}
        if kind == 0:
            return rest
        if kind == 1:
            return {**rest, pick(rng, ["", name + "x", "a" * 2000, "__class__"]): value[name]}
        return {**value, name: mutate_value(rng, value[name])}
    if isinstance(value, list) and value and rng.integers(4):
        index = int(rng.integers(len(value)))
        kind = rng.integers(8)
        if kind == 0:
            return value[:index] + value[index + 1 :]
        if kind == 1:
            return value * 2
        return [*value[:index], mutate_value(rng, value[index]), *value[index + 1 :]]
    if type(value) is int and rng.integers(2):
        return value + pick(rng, [-1, 1, 8, -8])
    return pick(rng, VALUES)


def mutate_json(rng, content):
    """Return JSON with a value changed, a name twice, or lists beyond any depth."""
    kind = rng.integers(20)
    if kind == 0:
        return b"[" * 100_000
    if kind == 1:
        return content.replace(b"{", b'{"a": 1, "a": 2, ', 1)
    if kind == 2:
        return b"[" + content + b"," + b"9" * 5000 + b"]"
    value = json.loads(content)
    for _ in range(rng.integers(1, 3)):
        value = mutate_value(rng, value)
    return json.dumps(value).encode()


def mutate_pickle(rng, content):
    """Return a pickle with opcodes removed, repeated, moved or added."""
    starts = [place for _, _, place in pickletools.genops(content)] + [len(content)]
    codes = [content[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(rng.integers(1, 4)):
        index = int(rng.integers(1, len(codes)))
        kind = rng.integers(5)
        if kind == 0:
            del codes[index]
        elif kind == 1:
            codes.insert(index, pick(rng, codes))
        elif kind == 2:
            codes[index] = pick(rng, codes)
        elif kind == 3:
            codes.insert(index, pick(rng, OPCODES))
        else:
            codes[index] = flip(rng, codes[index])
    return b"".join(codes)


def rezip(content, change):
    """Return a zip file with the content of its entries changed: change(name, content)."""
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, change(entry.filename, old.read(entry)))
    return out.getvalue()
