"""A cache may be damaged, full, shared or gone: what is read stays right."""

import logging
import multiprocessing
import os
from pathlib import Path

import pytest

from data_pipelines.range_cache import RangeCache


class Source:
    """Counts what is fetched; the content of an entry follows from its name."""

    def __init__(self, size: int = 1000) -> None:
        self.size, self.fetched, self.is_sound = size, [], True

    def read(self, cache: RangeCache, name: str) -> bytes:
        def fetch() -> bytes:
            self.fetched.append(name)
            return content_of(name, self.size)

        found = cache.read(name, self.size, fetch, lambda content: self.is_sound)
        assert found == content_of(name, self.size)
        return found


def content_of(name: str, size: int) -> bytes:
    return (name.encode() * size)[:size]


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/*") if path.is_file()]


def test_an_entry_is_fetched_once_by_whoever_shares_the_folder(tmp_path: Path) -> None:
    source = Source()
    for cache in (RangeCache(tmp_path / "c", 2**20), RangeCache(tmp_path / "c", 2**20)):
        for _ in range(3):
            source.read(cache, "ab-0-1000")
            source.read(cache, "ab-1000-2000")
    assert source.fetched == ["ab-0-1000", "ab-1000-2000"]


@pytest.mark.parametrize(
    "damage", [b"", b"abc", b"\0\0\0\0", None], ids=["empty", "cut", "zeros", "flipped"]
)
def test_a_damaged_entry_is_fetched_again_and_mended(tmp_path: Path, damage: bytes | None) -> None:
    source, cache = Source(), RangeCache(tmp_path, 2**20)
    source.read(cache, "one")
    [path] = entries(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:] if damage is None else damage)
    source.read(cache, "one")
    source.read(cache, "one")
    assert source.fetched == ["one", "one"]


def test_what_is_not_sound_is_passed_on_and_not_kept(tmp_path: Path) -> None:
    source, cache = Source(), RangeCache(tmp_path, 2**20)
    source.is_sound = False
    source.read(cache, "one")
    assert entries(tmp_path) == []
    source.is_sound = True
    source.read(cache, "one")
    source.read(cache, "one")
    assert source.fetched == ["one", "one"]


def test_a_folder_that_is_over_its_limit_already_is_trimmed_by_the_first_write(
    tmp_path: Path,
) -> None:
    generous, source = RangeCache(tmp_path, 2**20), Source()
    for number in range(20):
        source.read(generous, f"{number:02d}-old")
    source.read(RangeCache(tmp_path, 10_500), "new")
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 10_500


def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    source, cache = Source(), RangeCache(tmp_path, 2**20)
    monkeypatch.setattr(Path, "replace", full)
    source.read(cache, "one")
    assert entries(tmp_path) == []


def test_the_least_recently_used_go_first_and_the_limit_holds(tmp_path: Path) -> None:
    source, cache = Source(), RangeCache(tmp_path, 10_500)
    for number in range(9):
        source.read(cache, f"{number}-old")
        os.utime(tmp_path / f"{number}-" / f"{number}-old", (number, number))
    source.read(cache, "0-old")  # used again: now the newest
    for number in range(3):
        source.read(cache, f"{number}-new")
    left = {path.name for path in entries(tmp_path)}
    assert {"0-old", "0-new", "1-new", "2-new"} <= left
    assert not left & {"1-old", "2-old"}
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 10_500


def test_what_is_larger_than_the_limit_passes_through(tmp_path: Path) -> None:
    source, cache = Source(size=5000), RangeCache(tmp_path, 4000)
    source.read(cache, "big")
    source.read(cache, "big")
    assert source.fetched == ["big", "big"]
    assert entries(tmp_path) == []


def test_a_disk_that_fails_is_told_once_and_read_around(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = Source(), RangeCache(tmp_path / "c", 2**20)
    (tmp_path / "c").rmdir()
    (tmp_path / "c").write_text("no folder any more")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            source.read(cache, "one")
    assert len(source.fetched) == 3
    assert len([record for record in caplog.records if "reading on without" in record.message]) == 1


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache\.folder .*file/c cannot be made"):
        RangeCache(tmp_path / "file" / "c", 1000)


def hammer(folder: Path, seed: int) -> None:
    source, cache = Source(), RangeCache(folder, 20_000)
    for number in range(400):
        source.read(cache, f"{(seed + 7 * number) % 40:02d}-x")


def test_processes_that_share_a_folder_never_read_each_others_halves(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=hammer, args=(tmp_path, seed)) for seed in (0, 1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 20_000 + 3 * 20_000 / 64 + 1004
