"""Text that users bring: captions, metadata, prompts.

One law for all of it. Only regular files are opened, up to a bound in bytes. A byte order mark
names the encoding: UTF-8, UTF-16 or UTF-32. Text without a mark is UTF-8. Anything else is refused
with its line: the bytes of an older code page do not say which one it is.
"""

import codecs
from pathlib import Path

from vdx.files import FileError, read_bounded

__all__ = [
    "MAX_CAPTION_BYTES",
    "MAX_TEXT_BYTES",
    "check_text",
    "read_lines",
    "read_text",
]

MAX_TEXT_BYTES = 1 << 30  # of metadata or prompts; a larger data set belongs into records
MAX_CAPTION_BYTES = 1 << 23  # of one caption; a million characters have at most half of it

MARK = "\ufeff"  # the byte order mark as a character
# UTF-32 before UTF-16: its little-endian mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a file without byte order mark.

    Lines end with a line feed, whatever the file has.

    Raises FileError with the line for an unknown encoding, and what `read_bounded` raises.
    """
    data = read_bounded(path, max_bytes)
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), None)
    if encoding is None and b"\0" in data:
        raise FileError(
            f"{path}, line {_line_number(data[: data.index(0)])}: a zero byte. It is no text, or "
            "UTF-16 without a byte order mark. Save it as UTF-8."
        )

    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        raise FileError(_explain(path, data, error)) from None
    return text.lstrip(MARK).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a text file.

    Only line feeds and carriage returns end a line. U+2028 and others belong to the text. Files
    that were joined have byte order marks at the start of lines, which are removed.
    """
    return [line.lstrip(MARK) for line in read_text(path).split("\n")]


def check_text(text: str) -> str:
    """Return a text that UTF-8 can encode; raise ValueError for half a surrogate pair.

    JSON and the command line can carry such halves, no text encoder can read them. Also raises
    ValueError for more than MAX_CAPTION_BYTES characters.
    """
    if len(text) > MAX_CAPTION_BYTES:
        raise ValueError(f"it has {len(text):,} characters, at most {MAX_CAPTION_BYTES:,} are read")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start + 1} is U+{ord(text[error.start]):04X}, half of a surrogate "
            "pair: a character was cut in two, or its bytes are not UTF-8"
        ) from None
    return text


def _explain(path: str | Path, data: bytes, error: UnicodeDecodeError) -> str:
    """Return the message for bytes that are not in the encoding of a file."""
    before = data[: error.start].decode(error.encoding, "ignore")
    line = _line_number(before.encode())
    around = data[max(0, error.start - 10) : error.start + 10]
    message = f"{path}, line {line}: {around!r} is not {error.encoding.upper()} ({error.reason})."
    if error.encoding == "utf-8":
        message += (
            " Save it as UTF-8. Text of older Windows programs is converted by, for example: "
            "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        )
    return message


def _line_number(before: bytes) -> int:
    """Return the number of the line that follows UTF-8 text, counted from 1."""
    return before.replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1
