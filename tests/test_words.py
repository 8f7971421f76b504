"""The words of STYLE.md: its glossary, its first lines of docstrings, one field a line.

A file fails once, with every place in it: `file:line: word -> what to write`.
"""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# Words given up wherever they stand: comments, docstrings, strings, pages and, with their
# underscores and capitals read as spaces, identifiers and file names. Only words with no second,
# legitimate meaning in this codebase.
WORDS = {
    # Words of the glossary.
    r"told|tells?": "precompute / sparse_flow_hints / add_vector; a machine is not told",
    r"steer(s|ed|ing|able)?": "control",
    r"judg(e|es|ed|ing|ement)": "evaluate",
    r"held[ -]?outs?": "validation",
    r"wall(?![ -](clock|time))": "sample grid",
    r"steadiness": "temporal_consistency",
    r"learnt": "loss_mask (of a loss), learned (of a parameter)",
    r"moving pictures?": "iter_frames",
    r"pictures?": "image",
    r"on white": "letterbox",
    r"public (model|weights|request|checkpoint)s?": "pretrained",
    r"keep compiled": "enable_compilation_cache",
    r"whole or not": "atomic_write",
    r"bad in row": "max_bad_steps",
    r"stuck after": "watchdog_seconds",
    r"keep every": "keep_period",
    r"the house": "architecture",
    # Inverted or archaic English (rule 2).
    r"beside": "next to, with, in addition to; `combine` of trainables",
    r"alike": "the same, both, equally",
    r"so many": "the number",
    r"lies?|lain": "is, is stored, starts",
    r"behoves?": "is required",
    r"(go|goes|went|gone|going) on( with)?": "resume, continue",
    r"as it comes": "unchanged",
    # Machines do not ask, tell, say, know, hear or listen (rule 3).
    r"asks": "requires, evaluates, requests",
    r"(is|are|was|were|be|been) asked": "is evaluated, is requested, is required",
    r"listens?|listened|listening": "follows, is conditioned on",
    r"hears?|heard": "receives",
    r"knows?|known of": "has, contains, depends on",
}
# Names given up: whole identifiers, case and all, in code and between backticks on a page.
NAMES = {
    "Ask": "AttentionSpec",
    "Change": "WeightDelta",
    "Drawing": "an evaluator",
    "EXAMPLE|EXAMPLES": "dummy_batch",
    "Flying": "PendingStep",
    "GRIDS": "TIMESTEPS",
    "Judging": "EvalConfig",
    "Listed": "VideoEntry",
    "OVER": "ATTENTION_AXES",
    "Part": "Trainable",
    "Past": "CachePosition",
    "Place": "Slot",
    "Programs": "StepCompiler",
    "Proof": "CacheCalibration",
    "Public[A-Z]\\w*": "Pretrained*",
    "REACH": "MAX_RELATIVE_DISTANCE",
    "Rows": "StepTable",
    "STEERING": "CONTROL",
    "Stored": "StoredArray",
    "Streamer": "BlockwiseGenerator",
    "TIMES": "TIME_SAMPLERS",
    "Window": "MetricsAccumulator",
    "Work": "StepCost",
    "adopt": "resume_from",
    "after_past": "append_to_cache",
    "answers": "guided_denoiser",
    "described": "describe_initialisation",
    "explained": "exit_on_user_error",
    "questions": "stack_branches",
    "settle": "collect_pending",
    "settled": "with_pixel_mean",
    "shown": "frame_index_at",
    "turned": "shift_rope",
}
# (file, the word in lower case): why it may stand there, as a name that others gave.
OLD_KEYS = ("heldout", "judge", "steering", "bad in row", "keep every", "stuck after", "wall")
ALLOWED: dict[tuple[str, str], str] = {
    ("vdx/files.py", "tell"): "the method of a file object",
    ("vdx/data/scenes/captions.py", "steered"): "captions of the data, which do not change",
    ("vdx/data/scenes/world.py", "steered"): "the name of a motion in configs and captions",
    ("configs/control_tiny.py", "steered"): "the name of that motion",
    ("README.md", "steered"): "a prompt of that motion",
    ("docs/control.md", "steered"): "a prompt of that motion",
    **{("vdx/config/renamed.py", old): "a key of before" for old in OLD_KEYS},
    ("vdx/generate/manifest.py", "steer"): "a key of before",
}

NO_FIRST_WORDS = re.compile(r"(What|Of|As|That|Those|Whether|All|Without)\b")
FIRST_LINE = 80  # characters
MODULE = 400  # lines
FIELDS = 3  # `field: meaning` pairs in one paragraph of a docstring

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PATTERNS = {re.compile(rf"\b(?:{words})\b", re.IGNORECASE): to for words, to in WORDS.items()}
ANY_WORD = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
ANY_NAME = re.compile(rf"(?:{'|'.join(NAMES)})")
NAME_PATTERNS = {re.compile(rf"(?:{names})"): to for names, to in NAMES.items()}

FOLDERS = ["vdx", "configs", "docs", "launch", "benchmarks", "colab"]
SUFFIXES = {".py", ".html", ".md", ".sh", ".ipynb", ".yaml", ""}
FILES = [ROOT / "README.md"]
for folder in FOLDERS:
    FILES += sorted(
        path
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in SUFFIXES and "__pycache__" not in path.parts
    )
MODULES = [path for path in FILES if path.suffix == ".py" and path.is_relative_to(ROOT / "vdx")]


class Piece(NamedTuple):
    """A text of a file, with the number of its first line."""

    line: int
    text: str
    is_name: bool = False


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def spaced(identifier: str) -> str:
    """Return `keep_everyStep` as "keep every Step"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", identifier).replace("_", " ")


def pieces(path: Path, text: str) -> Iterator[Piece]:
    """Yield the texts of a file that a reader reads."""
    yield Piece(0, spaced(path.stem))
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                yield Piece(token.start[0], token.string)
            elif token.type == tokenize.NAME:
                yield Piece(token.start[0], token.string, is_name=True)
        return

    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > 2_000:  # an image in a notebook
            continue
        yield Piece(number, line)
        for quoted in re.findall(r"`([A-Za-z_]+)`", line):
            yield Piece(number, quoted, is_name=True)


@functools.cache
def is_suspect(text: str, is_name: bool) -> bool:
    """Return whether a text may hold a given-up word: one search each for the long tables."""
    if not is_name:
        return bool(ANY_WORD.search(text.replace("_", " ")))
    return bool(ANY_NAME.fullmatch(text) or ANY_WORD.search(spaced(text)))


def words_of(path: Path, text: str) -> list[str]:
    """List the given-up words of a file."""
    found = []
    for piece in pieces(path, text):
        if not is_suspect(piece.text, piece.is_name):
            continue
        names = [
            f"{name(path)}:{piece.line}: {piece.text} -> {to}"
            for pattern, to in NAME_PATTERNS.items()
            if piece.is_name and pattern.fullmatch(piece.text)
        ]
        found += names
        if names:
            continue

        read = piece.text.replace("_", " ")
        if piece.is_name:
            read = spaced(piece.text)
        for pattern, to in PATTERNS.items():
            for match in pattern.finditer(read):
                if (name(path), match[0].lower()) not in ALLOWED:
                    line = piece.line + read[: match.start()].count("\n")
                    found.append(f"{name(path)}:{line}: {match[0]} -> {to}")
    return sorted(set(found), key=lambda place: int(place.split(":")[1]))


def first_lines_of(path: Path, text: str) -> list[str]:
    """List the docstrings of a module whose first line is not one."""
    found = []
    for node in ast.walk(ast.parse(text)):
        docstring = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if not docstring:
            continue
        first = docstring.splitlines()[0]
        place = f"{name(path)}:{node.body[0].lineno}"
        if NO_FIRST_WORDS.match(first):
            found.append(f"{place}: {first.split()[0]} ... -> begin with a verb or a noun phrase")
        if len(first) > FIRST_LINE:
            found.append(f"{place}: {len(first)} characters -> at most {FIRST_LINE}")
    return found


def field_lists_of(path: Path, text: str) -> list[str]:
    """List the classes whose docstring explains more than FIELDS fields in one paragraph."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef):
            continue
        fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            heads = re.findall(r"((?:`?\w+`?(?:,\s|\sand\s|\sor\s))*`?\w+`?):\s", paragraph)
            listed = fields & set(re.findall(r"\w+", " ".join(heads)))
            if len(listed) > FIELDS:
                place = f"{name(path)}:{node.lineno}: {node.name}"
                listing = ", ".join(sorted(listed))
                found.append(f"{place}: {listing} -> a comment on each field's line")
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_words(path):
    text = path.read_text()
    found = words_of(path, text)
    if path in MODULES:
        found += first_lines_of(path, text)
    lines = len(text.splitlines())
    if path.suffix == ".py" and lines > MODULE:
        found.append(f"{name(path)}:{MODULE + 1}: {lines} lines -> at most {MODULE}")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_one_field_one_line(path):
    found = field_lists_of(path, path.read_text())
    assert not found, "\n" + "\n".join(found)


# ---- The checks themselves: each finds what was planted, and nothing in the words to keep.


@pytest.mark.parametrize(
    "planted",
    [
        "# The network is told the time.",
        '"""Judges a clip."""',
        "steering_scores = 1",
        "isTold = 1",
        'x = "the heldout split"',
        "class Flying: ...",
        "class PublicModel: ...",
        "y = questions(x)",
        '"""One line.\n\nThe network asks for a time."""',
        "# the wall of samples",
    ],
)
def test_a_planted_word_is_found(planted):
    assert len(words_of(ROOT / "vdx/planted.py", planted)) == 1


def test_the_line_of_a_word_in_a_long_string_is_its_own():
    (found,) = words_of(ROOT / "vdx/planted.py", '"""One line.\n\nTwo, judged."""')
    assert found.startswith("vdx/planted.py:3: judged")


@pytest.mark.parametrize("kept", ["# wall-clock seconds", "window = 1", "# a belief, believe"])
def test_other_words_are_kept(kept):
    assert not words_of(ROOT / "vdx/planted.py", kept)


@pytest.mark.parametrize("first", ["What is it.", "All of them.", "Return " + "x" * 80 + "."])
def test_a_planted_first_line_is_found(first):
    assert first_lines_of(ROOT / "vdx/planted.py", f'def f():\n    """{first}"""\n')


@pytest.mark.parametrize(("count", "is_found"), [(3, False), (4, True)])
def test_a_planted_list_of_fields_is_found(count, is_found):
    listing = ". ".join(f"f{i}: meaning {i}" for i in range(count))
    fields = "\n".join(f"    f{i}: int" for i in range(count))
    text = f'class C:\n    """A thing.\n\n    {listing}.\n    """\n\n{fields}\n'
    assert bool(field_lists_of(ROOT / "vdx/planted.py", text)) == is_found
