"""Measure how a codebase reads: the five rows of the table in vdx's style guide.

Run on vdx and on any other codebase, one column a folder:

    python benchmarks/style.py vdx ../nanodo ../kauldron

Only `*.py` files count; test files (`test_*.py`, `*_test.py`, folders named tests) do not.
"""

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

LONG_FUNCTION = 50  # lines; a function of 51 no longer fits a screen
MEASURED_FUNCTION = 20  # lines; shorter functions have one phase and need no blank line

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (*FUNCTIONS, ast.ClassDef)


def is_test(path: Path) -> bool:
    return path.name.startswith("test_") or path.stem.endswith("_test") or "tests" in path.parts


def comment_lines(text: str) -> set[int]:
    """Return the numbers of the lines with a comment, alone or after code."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the numbers of the lines inside docstrings."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            found.update(range(docstring.lineno, docstring.end_lineno + 1))
    return found


def lines_of(function: ast.AST) -> range:
    """Return the numbers of a function's lines, from `def` on, decorators excluded."""
    return range(function.lineno, function.end_lineno + 1)


def is_tuple_packed(node: ast.AST) -> bool:
    """Return whether a node is `a, b = x, y`; unpacking the result of a call is not."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def count(text: str) -> Counter:
    """Count, in the text of one file, what the rows of the table are made of."""
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]

    measured: set[int] = set()
    for function in functions:
        if len(lines_of(function)) > MEASURED_FUNCTION:
            measured.update(lines_of(function))
    measured -= docstring_lines(tree)

    lines = text.splitlines()
    blank = {number for number, line in enumerate(lines, 1) if not line.strip()}
    return Counter(
        lines=len(lines),
        long_functions=sum(len(lines_of(function)) > LONG_FUNCTION for function in functions),
        measured=len(measured),
        comments=len(measured & comment_lines(text)),
        blanks=len(measured & blank),
        tuples=sum(is_tuple_packed(node) for node in nodes),
        conditionals=sum(isinstance(node, ast.IfExp) for node in nodes),
    )


def measure(folder: Path) -> dict[str, str]:
    """Return the rows of the table for one folder."""
    paths = [path for path in folder.rglob("*.py") if not is_test(path.relative_to(folder))]
    if not paths:
        raise ValueError(f"{folder} holds no Python file; give the folder of a package")
    files = [count(path.read_text()) for path in paths]

    total: Counter = sum(files, Counter())
    percent = 100 / max(total["measured"], 1)
    per_thousand = 1000 / max(total["lines"], 1)
    return {
        "longest file, lines": f"{max(file['lines'] for file in files):,}",
        "functions over 50 lines": f"{total['long_functions']}",
        "comment / blank lines inside functions over 20 lines": (
            f"{total['comments'] * percent:.0f} / {total['blanks'] * percent:.0f} %"
        ),
        "tuple-packed assignments per 1,000 lines": f"{total['tuples'] * per_thousand:.1f}",
        "conditional expressions per 1,000 lines": f"{total['conditionals'] * per_thousand:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = parser.parse_args().folders

    columns = [measure(folder) for folder in folders]
    table = [["", *(str(folder) for folder in folders)]]
    table += [[name, *(column[name] for column in columns)] for name in columns[0]]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for name, *cells in table:
        row = [name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]
        print("  ".join(row).rstrip())


if __name__ == "__main__":
    main()
