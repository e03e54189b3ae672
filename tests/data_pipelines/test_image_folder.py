"""Planning an import: which images, under which keys, with which labels, in which shard."""

import os
from pathlib import Path

import pytest

from data_pipelines import image_folder
from data_pipelines.image_folder import find_images, plan_folder
from data_pipelines.image_import import Entry, FolderShard, Treatment
from data_pipelines.label_table import LabelTableError


def files(folder: Path, *names: str, size_bytes: int = 1) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size_bytes)
    return folder


def plan(folder: Path, rows: int = 10, treatment: Treatment = Treatment(), **files: Path):  # noqa: B008
    return plan_folder(folder, treatment=treatment, rows_per_shard=rows, **files)


def entries(shards: list[FolderShard]) -> list[Entry]:
    return [entry for shard in shards for entry in shard.entries]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------- images and keys


def test_images_are_found_at_any_depth_in_the_order_of_their_paths(tmp_path: Path) -> None:
    files(tmp_path, "b.JPG", "a/2.png", "a/10.jpeg", "c/d/e.WebP", "notes.txt", "x.gif", "jpg")
    files(tmp_path, ".hidden.jpg", "._a.jpg", ".thumbs/a.jpg")
    assert find_images(tmp_path) == ["a/10.jpeg", "a/2.png", "b.JPG", "c/d/e.WebP"]


def test_a_link_to_a_folder_is_not_followed_round_in_circles(tmp_path: Path) -> None:
    files(tmp_path, "a/1.jpg")
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert find_images(tmp_path) == ["a/1.jpg"]


def test_a_folder_without_images_and_a_file_are_refused(tmp_path: Path) -> None:
    files(tmp_path, "notes.txt")
    with pytest.raises(ValueError, match=r"holds no image \(none of jpg, jpeg, png, webp\)"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        find_images(tmp_path / "notes.txt")


def test_a_name_that_is_not_utf8_is_refused_and_shown_escaped(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.jpg")).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"'b\\udcff\.jpg', whose name is not UTF-8"):
        find_images(tmp_path)


def test_keys_are_paths_without_what_ends_a_key_in_a_tar_and_no_two_are_alike(tmp_path: Path):
    files(tmp_path, "a b.jpg", "a.b/c.d.jpg", "a_b.jpg", "a_b.png", "a_b-2.jpg", "süß.jpg")
    assert {entry.path: entry.key for entry in entries(plan(tmp_path))} == {
        "a b.jpg": "a_b",
        "a.b/c.d.jpg": "a_b/c_d",
        "a_b-2.jpg": "a_b-2",
        "a_b.jpg": "a_b-3",
        "a_b.png": "a_b-4",
        "süß.jpg": "süß",
    }


def test_a_shard_ends_at_its_number_of_images_or_of_bytes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(image_folder, "SHARD_BYTES", 25)
    files(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg", size_bytes=10)
    files(tmp_path, "e.jpg", size_bytes=100)

    def sizes(rows: int, treatment: Treatment) -> list[int]:
        return [len(shard.entries) for shard in plan(tmp_path, rows, treatment)]

    assert sizes(10, Treatment()) == [2, 2, 1]
    assert sizes(1, Treatment()) == [1, 1, 1, 1, 1]
    assert sizes(3, Treatment(size_px=8)) == [3, 2]  # their bytes are not those of the files


# ---------------------------------------------------------------------------------------- labels


def test_labels_name_images_with_or_without_the_ending(tmp_path: Path) -> None:
    files(tmp_path, "a/1.jpg", "a/2.png")
    labels = written(tmp_path / "labels.csv", "file,hat\na/2,1\na/1.jpg,0\n")
    shards = plan(tmp_path, labels=labels)
    assert [(entry.path, entry.cells) for entry in entries(shards)] == [
        ("a/1.jpg", ("0",)),
        ("a/2.png", ("1",)),
    ]
    assert [column.name for column in shards[0].columns] == ["hat"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,1\n", r"no line for b\.jpg .* \(2 such images\)"),
        ("a,1\nb,1\nb.png,1\nz,0\ny,0\n", r"line 3: 'b' may be b\.jpg or b\.png"),
        ("a,1\nb.jpg,1\nb.png,1\nz,0\ny,0\n", r"line 5: .* no image 'z' \(2 such lines\)"),
        ("a,1\nb.jpg,1\nb.png,1\na.jpg,0\n", r"line 5: a\.jpg has labels in line 2 already"),
    ],
)
def test_labels_and_images_must_be_the_same_ones(tmp_path: Path, rows: str, message: str) -> None:
    files(tmp_path, "a.jpg", "b.jpg", "b.png")
    labels = written(tmp_path / "labels.csv", "file,hat\n" + rows)
    with pytest.raises(LabelTableError, match=message):
        plan(tmp_path, labels=labels)


def test_only_the_images_on_a_list_are_taken_and_need_labels(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    labels = written(tmp_path / "labels.csv", "file,hat\na,1\nc,0\nd,0\n")
    only = written(tmp_path / "train.txt", "c\n\n./a.jpg\n")
    found = entries(plan(tmp_path, labels=labels, only=only))
    assert [(entry.path, entry.cells) for entry in found] == [("a.jpg", ("1",)), ("c.jpg", ("0",))]
    written(only, "b\n")
    with pytest.raises(LabelTableError, match=r"no line for b\.jpg"):
        plan(tmp_path, labels=labels, only=only)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no image"),
        ("a\nz\n", "line 2: .* has no image 'z'"),
        ("a\n\na.jpg\n", r"line 3: a\.jpg is in line 1 already"),
    ],
)
def test_a_list_that_does_not_fit_the_folder_is_refused(tmp_path: Path, text, message) -> None:
    files(tmp_path, "a.jpg")
    with pytest.raises(LabelTableError, match=message):
        plan(tmp_path, only=written(tmp_path / "train.txt", text))
