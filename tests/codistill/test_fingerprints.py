"""What tells the files of a run from others."""

import os
import shutil

import pytest

from codistill import fingerprints
from codistill.fingerprints import PIECE_BYTES, PIECES, changed, of_data, of_model, sampled


def test_weights_are_known_by_pieces_from_end_to_end(tmp_path):
    path = tmp_path / "model.safetensors"
    content = bytes(range(256)) * (PIECES * PIECE_BYTES // 100)  # more than all pieces
    path.write_bytes(content)
    before = sampled(path)
    os.utime(path, (0, 0))
    assert sampled(path) == before
    for place in (0, PIECE_BYTES - 1, len(content) - PIECE_BYTES, len(content) - 1):
        changed_content = bytearray(content)
        changed_content[place] ^= 1
        path.write_bytes(changed_content)
        assert sampled(path) != before, place
    path.write_bytes(content + b"\0")
    assert sampled(path) != before
    path.write_bytes(b"")
    assert sampled(path) != before


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
)
def test_every_file_that_matters_is_looked_at(models, tmp_path, name):
    folder = shutil.copytree(models["small"], tmp_path / "model")
    before = of_model(str(folder))
    (folder / "README.md").write_text("of no matter")
    assert of_model(str(folder)) == before
    with (folder / name).open("a") as file:
        file.write(" ")
    assert changed(before, of_model(str(folder))) == [name]


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch):
    where = {"org/model": "/cache/models--org--model/snapshots/1a2b/config.json"}
    monkeypatch.setattr(fingerprints, "try_to_load_from_cache", lambda path, name: where.get(path))
    assert of_model("org/model") == {"commit": "1a2b"}
    assert of_model("org/other") == {}


def test_problems_in_a_folder_are_known_by_file(tmp_path):
    for name in ("state.json", "data-00000.arrow"):
        (tmp_path / name).write_text(name)
    before = of_data("data.train", [tmp_path])
    (tmp_path / "data-00000.arrow").write_text("other")
    (tmp_path / "data-00001.arrow").write_text("new")
    assert changed(before, of_data("data.train", [tmp_path])) == [
        "data-00000.arrow",
        "data-00001.arrow",
    ]


def test_several_files_may_have_other_names_and_not_another_order(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text(name[0])
    (tmp_path / "d.jsonl").write_text("a")
    a, b, c, d = (tmp_path / f"{name}.jsonl" for name in "abcd")
    before = of_data("data.train", [a, b])
    assert of_data("data.train", [d, b]) == before
    assert changed(before, of_data("data.train", [b, a])) == ["contents 1", "contents 2"]
    assert changed(before, of_data("data.train", [a, b, c])) == ["contents 3"]


def test_only_the_parts_of_a_folder_count(tmp_path):
    (tmp_path / "part.jsonl").write_text("1")
    before = of_data("data.train", [tmp_path])
    (tmp_path / "README.md").write_text("of no matter")
    assert of_data("data.train", [tmp_path]) == before
    (tmp_path / "more.jsonl").write_text("2")
    assert changed(before, of_data("data.train", [tmp_path])) == ["more.jsonl"]
