"""Text of users: every encoding that a mark names, refusals with file and line, only real files."""

import os
import random
import time

import pytest

from vdx.text_files import MAX_CAPTION_BYTES, check_text, read_lines, read_text

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")
ALPHABET = "ab é ß \u2028 \u2029 \x85 日本 \U0001f600 \t \u0301 \x1c \xa0 \u200b"
# Text that a code page has.
SPOKEN = {"cp1252": "naïve café", "cp1251": "Красный мяч", "cp932": "赤い玉", "gbk": "红球"}


def texts(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET + "\n", k=rng.randrange(40))) for _ in range(count)]


def written(folder, text, encoding, newline="\n"):
    path = folder / "caption.txt"
    path.write_bytes(text.replace("\n", newline).encode(encoding))
    return path


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_is_the_same_in_every_encoding(tmp_path, encoding, newline):
    for text in ("", *texts(20)):
        path = written(tmp_path, text, encoding, newline)
        assert read_text(path) == text
        assert read_lines(path) == text.split("\n")


def test_the_marks_of_both_byte_orders_are_no_text(tmp_path):
    path = tmp_path / "a.txt"
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        path.write_bytes("\ufeffrot und grün\n".encode(encoding))
        assert read_text(path) == "rot und grün\n"


def test_marks_at_the_start_of_joined_files_are_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(f"{word}\n".encode("utf-8-sig") for word in ("one", "two")))
    assert read_lines(path) == ["one", "two", ""]


@pytest.mark.parametrize("encoding", SPOKEN)
@pytest.mark.parametrize("line", [1, 2, 7])
def test_a_code_page_is_refused_by_file_and_line(tmp_path, encoding, line):
    path = written(tmp_path, "plain\n" * (line - 1) + SPOKEN[encoding], encoding, "\r\n")
    with pytest.raises(ValueError, match=rf"caption\.txt, line {line}: .*is not UTF-8.*iconv"):
        read_text(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_wide_text_without_a_mark_is_refused(tmp_path, encoding):
    with pytest.raises(ValueError, match=r"caption\.txt, line 1: .*byte order mark"):
        read_text(written(tmp_path, "a red ball", encoding))


def test_half_a_wide_character_is_refused_with_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\ntwo\n".encode("utf-16-le") + b"x")
    with pytest.raises(ValueError, match=r"a\.txt, line 3: .*is not UTF-16"):
        read_text(path)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, kind in (("pipe", "pipe"), ("zero", "device"), ("", "folder")):
        with pytest.raises(ValueError, match=rf"{name} is a {kind}; only regular files"):
            read_text(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "nothing")


def test_a_file_beyond_the_bound_is_refused(tmp_path):
    path = written(tmp_path, "12345678", "utf-8")
    assert read_text(path, max_bytes=8) == "12345678"
    with pytest.raises(ValueError, match=r"caption\.txt is longer than 7 bytes"):
        read_text(path, max_bytes=7)


def test_a_million_characters_take_bounded_time(tmp_path):
    begin = time.process_time()
    for encoding in ENCODINGS:
        for text in ("\U0001f600" * 1_000_000, "\n" * 1_000_000):
            assert len(read_text(written(tmp_path, text, encoding))) == 1_000_000
    assert time.process_time() - begin < 5


def test_halves_of_surrogate_pairs_are_no_text():
    for text in ("", *texts(20)):
        assert check_text(text) == text
        for half in ("\ud83d", "\ude00", "\udcff"):
            with pytest.raises(ValueError, match=f"U.{ord(half):04X}, half of a surrogate pair"):
                check_text(text + half + text)


def test_text_beyond_the_bound_of_captions_is_refused():
    with pytest.raises(ValueError, match="8,388,609 characters, at most 8,388,608"):
        check_text("x" * (MAX_CAPTION_BYTES + 1))
