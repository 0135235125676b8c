"""Folders of images and arrays: round trips, order, and one clear line for everything that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from grafting.errors import UserError
from grafting.eval.images import read_images, read_labels, write_images


def random_images(n: int, channels: int, size: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (n, size, size, channels), dtype=torch.uint8)


def one_line(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        read_images(path)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_written_folder_reads_back_bit_for_bit(tmp_path, channels) -> None:
    images, labels = random_images(12, channels), list(range(12))
    write_images(images, tmp_path / "out", labels)
    assert torch.equal(read_images(tmp_path / "out"), images)
    assert read_labels(tmp_path / "out", 12).tolist() == labels
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png"))[:2] == ["000000.png", "000001.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_writing_again_replaces_all(tmp_path) -> None:
    write_images(random_images(5, 1), tmp_path / "out", torch.arange(5))
    fewer = random_images(2, 3)
    write_images(fewer, tmp_path / "out")
    assert torch.equal(read_images(tmp_path / "out"), fewer)
    assert read_labels(tmp_path / "out") is None


def test_a_failing_write_leaves_the_old_folder(tmp_path, monkeypatch) -> None:
    old = random_images(3, 1)
    write_images(old, tmp_path / "out")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left"):
        write_images(random_images(3, 1), tmp_path / "out")
    assert torch.equal(read_images(tmp_path / "out"), old)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        write_images(random_images(1, 1), tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_files_come_in_the_order_of_their_names_and_mixed_modes_become_colour(tmp_path) -> None:
    Image.new("L", (4, 3), 10).save(tmp_path / "b.png")
    Image.new("RGBA", (4, 3), (1, 2, 3, 0)).save(tmp_path / "a.PNG")
    Image.new("RGB", (4, 3), (9, 9, 9)).save(tmp_path / "c.jpeg", quality=100)
    (tmp_path / "notes.txt").write_text("not an image")
    images = read_images(tmp_path)
    assert images.shape == (3, 3, 4, 3)
    assert images[0, 0, 0].tolist() == [1, 2, 3]
    assert images[1, 0, 0].tolist() == [10, 10, 10]


def test_bad_folders_name_the_culprit(tmp_path) -> None:
    one_line(tmp_path / "nowhere", "nowhere", "not found")
    empty = tmp_path / "empty"
    empty.mkdir()
    one_line(empty, "empty", "no PNG or JPG")
    (tmp_path / "file.txt").write_text("x")
    one_line(tmp_path / "file.txt", "file.txt")


@pytest.mark.parametrize("damage", ["truncated", "random", "empty", "deep"])
def test_a_bad_file_is_named(tmp_path, damage) -> None:
    write_images(random_images(3, 3, 32), tmp_path / "out")
    victim = tmp_path / "out" / "000001.png"
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-700])
    elif damage == "random":
        victim.write_bytes(np.random.default_rng(0).bytes(500))
    elif damage == "empty":
        victim.write_bytes(b"")
    else:
        Image.fromarray(np.full((32, 32), 40000, dtype=np.uint16)).save(victim)
    one_line(tmp_path / "out", "000001.png")


def test_mixed_sizes_name_the_file_and_both_sizes(tmp_path) -> None:
    write_images(random_images(2, 1), tmp_path)
    Image.new("L", (9, 8)).save(tmp_path / "x.png")
    one_line(tmp_path, "x.png", "9x8", "6x6")


@pytest.mark.parametrize("key", ["arr_0", "images"])
def test_arrays_are_read_with_their_labels(tmp_path, key) -> None:
    images = random_images(4, 3)
    np.savez(tmp_path / "x.npz", **{key: images.numpy(), "labels": np.arange(4)})
    assert torch.equal(read_images(tmp_path / "x.npz"), images)
    assert read_labels(tmp_path / "x.npz").tolist() == [0, 1, 2, 3]


def test_bad_arrays_name_the_file(tmp_path) -> None:
    path = tmp_path / "x.npz"
    one_line(path, "x.npz", "not found")
    path.write_bytes(np.random.default_rng(0).bytes(300))
    one_line(path, "x.npz")
    np.savez(path, other=np.zeros(3))
    one_line(path, "x.npz", "arr_0", "other")
    np.savez(path, arr_0=np.zeros((2, 4, 4, 3)))
    one_line(path, "x.npz", "float64")
    np.savez(path, arr_0=np.array([{"a": 1}], dtype=object))  # a pickle inside is refused, not run
    one_line(path, "x.npz")
    np.savez(path, arr_0=random_images(50, 3).numpy())
    path.write_bytes(path.read_bytes()[:-2000])
    one_line(path, "x.npz")


@pytest.mark.parametrize("content", ["[1, 2", '{"a": 1}', '["1", "2"]', "[1.5, 2]", "[true, false]", "\xff", "[1]"])
def test_bad_labels_are_one_line(tmp_path, content) -> None:
    write_images(random_images(2, 1), tmp_path / "out")
    (tmp_path / "out" / "labels.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"labels\.json") as error:
        read_labels(tmp_path / "out", 2)
    assert "\n" not in str(error.value)


def test_labels_are_a_json_list(tmp_path) -> None:
    write_images(random_images(2, 1), tmp_path / "out", [3, 4])
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == [3, 4]
