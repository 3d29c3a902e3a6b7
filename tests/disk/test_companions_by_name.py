"""Files that belong to a model are found by their names, also where they are links, as in the hub's cache."""

import json

import pytest

from avss.composer.checking import _cached
from avss.composer.disk import is_hub_id
from avss.errors import ModelLoadError
from avss.models.shards import copy_companions


def hub_folder(tmp_path):
    """A snapshot of links into a folder of blobs beside it, and one module that points out of it."""
    blobs, source = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    (source / "1_Pooling").mkdir(parents=True)
    (tmp_path / "snapshots" / "secret").mkdir()
    (tmp_path / "snapshots" / "secret" / "config.json").write_text("{}")
    files = {
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../secret"}]),
        "preprocessor_config.json": "{}",
        "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    }
    for number, (name, text) in enumerate(files.items()):
        (blobs / str(number)).write_text(text)
        (source / name).symlink_to(blobs / str(number))
    return source


def test_links_of_the_cache_are_copied_and_nothing_outside(tmp_path):
    source = hub_folder(tmp_path)
    folder = tmp_path / "out" / "model"
    folder.mkdir(parents=True)
    copy_companions(source, folder)
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode_cls_token"]
    assert not (folder / "1_Pooling" / "config.json").is_symlink()
    assert (folder / "preprocessor_config.json").is_file()
    assert not (folder.parent / "secret").exists()


def test_a_listing_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "modules.json").write_text('{"path": "1_Pooling"}')
    with pytest.raises(ModelLoadError, match="not a list of sentence-transformers modules"):
        copy_companions(tmp_path, tmp_path / "out")


def test_what_is_no_hub_id_is_not_looked_for():
    assert _cached("./missing") is None
    assert _cached("missing/") is None
    assert _cached("gone/model") is None
    assert [is_hub_id(name) for name in ("gpt2", "owner/name", "a/b/c", "missing/", "no.gguf", str(__file__))] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
