"""Names inside of model folders stay inside of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from alpaca_lora.errors import ModelFileError
from alpaca_lora.weights.contained import MAX_JSON_BYTES, contained_file, read_json

ESCAPES = ["../a.json", "/etc/passwd", "sub/a.json", "..", ".", "", "a\\b", "C:a.json", "a\0b", "x" * 300]


@pytest.mark.parametrize("name", ESCAPES)
def test_name_that_is_no_plain_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.json").write_text("{}")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"index\.json: layer\.weight: names the file .*plain file name"):
        contained_file(root, name, named_by=root / "index.json", field="layer.weight")


def test_links(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside.json", tmp_path / "root"
    root.mkdir()
    outside.write_text("{}")
    (root / "real.json").write_text("{}")
    (root / "inside.json").symlink_to("real.json")
    (root / "outside.json").symlink_to(outside)
    (root / "dangling.json").symlink_to("nothing.json")
    assert contained_file(root, "inside.json").read_text() == "{}"
    with pytest.raises(ModelFileError, match="link to a file outside"):
        contained_file(root, "outside.json")
    with pytest.raises(ModelFileError, match="is missing"):
        contained_file(root, "dangling.json")


def test_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.json").write_text("{}")
    (tmp_path / "link").symlink_to("real")
    assert contained_file(tmp_path / "link", "a.json").exists()


def test_layout_of_the_hub_cache(tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    snapshot, blobs, other = model / "snapshots" / "abc", model / "blobs", tmp_path / "models--org--other" / "blobs"
    for folder in (snapshot, blobs, other):
        folder.mkdir(parents=True)
        (folder / "data").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/data")
    (snapshot / "stolen.json").symlink_to("../../../models--org--other/blobs/data")
    assert contained_file(snapshot, "config.json").exists()
    with pytest.raises(ModelFileError, match="outside"):
        contained_file(snapshot, "stolen.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"a": 1,\n}', ":3: is not JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b" " * (MAX_JSON_BYTES + 1), "too large"),
    ],
)
def test_bad_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        read_json(path)


def test_good_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}
