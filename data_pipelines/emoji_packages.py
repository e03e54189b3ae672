"""Where emoji art comes from: npm packages of pinned bytes, kept in a cache folder.

Art is fetched on the user's machine and never part of this repository. A tarball counts as cached
when its bytes have the SHA-512 written here, which is the one that npm's registry lists for it; so
a download that broke off, or a package that was replaced, is never used. Nothing of a package is
run: the tarballs are not even unpacked, only their JSON is read.
"""

import base64
import hashlib
import json
import os
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_FETCH_SECONDS: Final = 300


class PackageError(OSError):
    """A package could not be had from npm's registry."""


@dataclass(frozen=True, slots=True)
class Package:
    """One version on npm's registry; `integrity` as `npm view NAME@VERSION dist.integrity` says."""

    name: str
    version: str
    licence: str
    integrity: str

    @property
    def file_name(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE: Final = Package(
    "emojibase-data",
    "17.0.0",
    "MIT",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
"""Names, tags, groups and skin tones of every emoji."""

VENDORS: Final[dict[str, Package]] = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "Apache 2.0, Google",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT, Microsoft",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "CC BY 4.0, Twitter and jdecked",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "openmoji": Package(
        "@iconify-json/openmoji",
        "1.2.29",
        "CC BY-SA 4.0, OpenMoji",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
    ),
}
"""Drawings of the same emoji by four hands. All are vectors, so they are sharp at every size, and
all may be used and passed on; Apple's and Facebook's art may not and is left out."""


def default_cache() -> Path:
    """`diti/emoji` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diti" / "emoji"


def fetch_packages(folder: Path) -> list[str]:
    """Bring every package into `folder`; names of those that were fetched, the others were there.

    Raises:
        FileNotFoundError: npm is not installed.
        PackageError: npm could not fetch a package, or got other bytes than those pinned here.
    """
    missing = [package for package in (EMOJIBASE, *VENDORS.values()) if not _is_in(folder, package)]
    for package in missing:
        _fetch(package, folder)
    return [package.name for package in missing]


def read_json(folder: Path, package: Package, member: str) -> Any:
    """The content of one of its JSON files.

    Raises:
        PackageError: the package is not in `folder`, whole and as pinned here.
    """
    if not _is_in(folder, package):
        raise PackageError(f"{folder / package.file_name} is missing or damaged; fetch it again")
    with tarfile.open(folder / package.file_name) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None, f"{package.name} has no {member}"
        return json.load(file)


def _is_in(folder: Path, package: Package) -> bool:
    path = folder / package.file_name
    return path.is_file() and _integrity_of(path) == package.integrity


def _integrity_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    return f"sha512-{base64.b64encode(digest).decode()}"


def _fetch(package: Package, folder: Path) -> None:
    """`npm pack` downloads a tarball and does nothing else; it is moved into place when whole."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}@{package.version}"
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as scratch:
        try:
            done = subprocess.run(  # noqa: S603 (a name and a version of the table above)
                ["npm", "pack", wanted, "--ignore-scripts", "--fetch-retries=1"],  # noqa: S607
                cwd=scratch,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_FETCH_SECONDS,
                check=False,
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                "emoji art is fetched with npm, which is not installed (Debian, Ubuntu: apt "
                f"install npm); or bring a cache folder that holds {package.file_name}"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise PackageError(
                f"npm did not fetch {wanted} within {_FETCH_SECONDS} s; is its registry reachable?"
            ) from error
        fetched = Path(scratch) / package.file_name
        if done.returncode != 0 or not fetched.is_file():
            raise PackageError(f"npm cannot fetch {wanted}: {_reason_in(done.stderr)}")
        if (found := _integrity_of(fetched)) != package.integrity:
            raise PackageError(
                f"npm's registry gave other bytes for {wanted} ({found[:20]}...) than this version "
                f"pins ({package.integrity[:20]}...); they are not used"
            )
        fetched.replace(folder / package.file_name)


def _reason_in(stderr: str) -> str:
    """What npm says went wrong, in one line."""
    prefixes = ("npm error ", "npm ERR! ")
    lines = [line for line in stderr.splitlines() if line.startswith(prefixes)]
    said = [line[len(prefixes[0]) :] for line in lines if "complete log" not in line]
    return "; ".join(said[:3]) or "it says nothing; run that npm command by hand"
