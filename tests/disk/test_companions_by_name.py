"""Files that belong to a model are found by their names, also where they are links, as in the hub's cache."""

import json

from avss.composer.checking import _cached
from avss.models.load import _copy_companions
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
    for number, copies in enumerate((copy_companions, _copy_companions)):
        folder = tmp_path / f"out{number}" / "model"
        folder.mkdir(parents=True)
        copies(source, folder)
        assert json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode_cls_token"]
        assert not (folder / "1_Pooling" / "config.json").is_symlink()
        assert (folder / "preprocessor_config.json").is_file()
        assert not (folder.parent / "secret").exists()


def test_what_is_no_hub_id_is_not_looked_for():
    assert _cached("./missing") is None
    assert _cached("missing/") is None
    assert _cached("gone/model") is None
