"""Only regular files are opened, and none is read beyond its bound."""

import os
import socket

import pytest

from vdx.files import FileError, check_regular_file, open_regular, read_bounded


@pytest.fixture
def make(tmp_path):
    """make(kind): the path of something that is no regular file."""
    with socket.socket(socket.AF_UNIX) as listener:

        def one(kind):
            path = tmp_path / kind
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            elif kind == "socket":
                listener.bind(str(path))
            else:
                path.symlink_to("/dev/zero")
            return path

        yield one


@pytest.mark.parametrize("read", [check_regular_file, open_regular, lambda p: read_bounded(p, 9)])
@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device"])
def test_only_regular_files_are_opened(kind, read, make):
    path = make(kind)
    with pytest.raises(FileError, match=f"{path.name} is a {kind}; only regular files"):
        read(path)


def test_a_regular_file_is_read_through_links_and_to_its_bound(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert check_regular_file(tmp_path / "link") == 5
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"12345"
    assert read_bounded(tmp_path / "link", 5) == b"12345"
    with pytest.raises(FileError, match="file is longer than 4 bytes"):
        read_bounded(tmp_path / "file", 4)


def test_names_that_no_file_can_have(tmp_path):
    with pytest.raises(FileError, match=r"'a\\x00b' cannot be the name"):
        open_regular("a\0b")
    with pytest.raises(FileNotFoundError, match="absent"):
        open_regular(tmp_path / "absent")
