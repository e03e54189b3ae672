"""Fetching packages with the real npm: from the registry, from a false one, from none at all."""

import gzip
import hashlib
import http.server
import json
import shutil
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines import emoji_packages
from data_pipelines.emoji_packages import (
    EMOJIBASE,
    VENDORS,
    Package,
    PackageError,
    default_cache,
    fetch_packages,
    read_json,
)
from tests.emoji_art import real_packages
from tests.tars import tar_of

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed here")


def tarball(**files: object) -> bytes:
    """A package with these JSON files, as npm packs it."""
    members = {"package.json": {"name": "small", "version": "1.0.0"}} | {
        f"{name}.json": content for name, content in files.items()
    }
    tar = tar_of([(f"package/{name}", json.dumps(c).encode()) for name, c in members.items()])
    return gzip.compress(tar, mtime=0)


def integrity(data: bytes) -> str:
    return f"sha512-{b64encode(hashlib.sha512(data).digest()).decode()}"


GOOD = tarball(numbers=[1, 2])
SMALL = Package("small", "1.0.0", "none", integrity(GOOD))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A registry on this machine with the package `small`, and npm pointed to it.

    Its tarball is under "small"; a test may put other bytes there.
    """
    tarballs = {"small": GOOD}

    class Registry(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".tgz"):
                answer = tarballs["small"]
            else:
                url = f"http://127.0.0.1:{self.server.server_port}/small/-/small-1.0.0.tgz"
                dist = {"tarball": url, "integrity": integrity(tarballs["small"])}
                version = {"name": "small", "version": "1.0.0", "dist": dist}
                answer = json.dumps({"name": "small", "versions": {"1.0.0": version}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setattr(emoji_packages, "EMOJIBASE", SMALL)
    monkeypatch.setattr(emoji_packages, "VENDORS", {})
    yield tarballs
    server.shutdown()
    server.server_close()


@needs_npm
def test_a_package_is_fetched_once_and_only_its_tarball_is_kept(tmp_path: Path, served) -> None:
    folder = tmp_path / "new" / "cache"
    assert fetch_packages(folder) == ["small"]
    assert [path.name for path in folder.iterdir()] == ["small-1.0.0.tgz"]
    assert read_json(folder, SMALL, "numbers.json") == [1, 2]
    served["small"] = b"not asked for any more"
    assert fetch_packages(folder) == []


@needs_npm
def test_a_damaged_package_in_the_cache_is_fetched_again_and_never_read(tmp_path, served) -> None:
    (tmp_path / "small-1.0.0.tgz").write_bytes(GOOD[:-1])
    with pytest.raises(PackageError, match=r"small-1\.0\.0\.tgz is missing or damaged"):
        read_json(tmp_path, SMALL, "numbers.json")
    assert fetch_packages(tmp_path) == ["small"]
    assert read_json(tmp_path, SMALL, "numbers.json") == [1, 2]


@needs_npm
def test_other_bytes_than_those_that_are_pinned_are_not_used(tmp_path: Path, served) -> None:
    served["small"] = tarball(numbers=[6, 6, 6])
    with pytest.raises(PackageError, match=r"gave other bytes for small@1\.0\.0") as caught:
        fetch_packages(tmp_path / "cache")
    assert integrity(served["small"])[:20] in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


@needs_npm
def test_a_registry_that_does_not_answer_is_said_in_one_line(tmp_path, served, monkeypatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_fetch_retry_mintimeout", "1")
    with pytest.raises(PackageError, match=r"npm cannot fetch small@1\.0\.0: .*ECONNREFUSED") as e:
        fetch_packages(tmp_path / "cache")
    assert len(str(e.value).splitlines()) == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_npm_it_is_said_how_to_get_it(tmp_path: Path, served, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"npm, which is not installed .*apt install npm"):
        fetch_packages(tmp_path / "cache")


def test_the_cache_lies_where_the_user_keeps_caches(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "diti" / "emoji"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "diti" / "emoji"


def test_the_real_packages_state_the_licences_that_are_written_here() -> None:
    folder = real_packages()
    assert read_json(folder, EMOJIBASE, "package.json")["license"] == EMOJIBASE.licence
    for package in VENDORS.values():
        stated = read_json(folder, package, "info.json")["license"]["title"]
        assert package.licence.startswith(stated + ",")
        assert package.version == read_json(folder, package, "package.json")["version"]
