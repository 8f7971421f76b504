"""The cache: keys of content and settings, results complete or absent."""

import pytest

from vdx.data.preparation.store import Store, key_of


def test_a_key_depends_on_every_part_and_on_no_order():
    parts = {"stage": "look", "version": 1, "settings": {"a": 1, "b": 2}, "sha256": "x"}
    key = key_of(**parts)
    assert key == key_of(**dict(reversed(parts.items())))
    assert key == key_of(**{**parts, "settings": {"b": 2, "a": 1}})
    for name in parts:
        assert key != key_of(**{**parts, name: "other"})


def test_a_result_is_made_once(tmp_path):
    store = Store(tmp_path, "look", ".json")
    key = key_of(a=1)
    assert store.get(key, lambda: b"result") == b"result"
    assert store.get(key, lambda: pytest.fail("made again")) == b"result"


def test_a_failure_leaves_nothing(tmp_path):
    store = Store(tmp_path, "look", ".json")
    key = key_of(a=1)
    with pytest.raises(ZeroDivisionError):
        store.get(key, lambda: bytes(1 // 0))
    assert not store.has(key)
    part = store.path(key).with_name(".half.json")
    part.parent.mkdir(parents=True)
    part.write_text("ha")
    store.remove_parts()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
