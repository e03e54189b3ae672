"""A released encoder: the trained one's z, from torch alone; a hostile folder is refused, in words.

What publishing writes is read here as another team would read it.
"""

import ast
import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.object_store import ObjectStore
from pretrain import released_encoder
from pretrain.released_encoder import ReleaseError, load_encoder, preprocess
from pretrain.trained import TrainedEncoder, digest_of, load_published_encoder
from tests.published_files import RUN_CONFIG, changed, write_run
from tests.tiny_release import RESNET10, tiny_trained
from tools.publish import publish_encoder

STORE = ObjectStore()
ENCODERS = {
    "conv": (),
    "no attention": ("task.encoder.attention_after=null",),
    "attention first, more heads": (
        "task.encoder={latent_dim: 24, channels: [64, 96], attention_after: 1, num_heads: 8}",
    ),
    "resnet10": RESNET10,
}
TORCH_IMPORTS = {
    *("torch", "torchgen", "functorch", "typing_extensions", "filelock", "sympy", "mpmath"),
    *("networkx", "jinja2", "markupsafe", "fsspec", "setuptools", "_distutils_hack"),
}


def published(tmp_path: Path, trained: TrainedEncoder) -> Path:
    publish_encoder(STORE, trained, str(tmp_path / "release"), ema=True)
    return tmp_path / "release"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder; tests must not change it."""
    return published(tmp_path_factory.mktemp("published"), tiny_trained())


def random_pixels(size_px: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, size_px, size_px, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# --- the same encoder -----------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", ENCODERS.values(), ids=ENCODERS.keys())
def test_z_is_the_trained_encoders(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    trained = tiny_trained(*overrides)
    encoder = load_encoder(published(tmp_path, trained))
    pixels = random_pixels(32)
    wanted = trained.encoder(2 * (pixels.permute(0, 3, 1, 2) / 255.0) - 1)
    z = encoder(preprocess(pixels))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, wanted, rtol=1e-4, atol=float(1e-5 * wanted.abs().max()))
    assert wanted.std(dim=0).mean() > 1e-3 * wanted.abs().max(), "images of one z prove nothing"
    assert digest_of(encoder.network) == trained.sha256
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_an_authors_encoder_is_the_same_too(tmp_path: Path) -> None:
    trained = load_published_encoder(write_run(tmp_path))
    encoder = load_encoder(published(tmp_path, trained))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(encoder(images), trained.encoder(images), rtol=1e-4, atol=1e-5)


def test_images_in_the_other_memory_layout_give_the_same_digits(release: Path) -> None:
    encoder = load_encoder(release)
    images = preprocess(random_pixels(32))
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(encoder(channels_last), encoder(images.contiguous()))


def test_it_computes_in_the_dtype_that_it_is_moved_to(release: Path) -> None:
    encoder = load_encoder(release)
    images = preprocess(random_pixels(32))
    exact = encoder(images)
    z = encoder.bfloat16()(images)
    assert z.dtype == torch.bfloat16
    assert (z.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_pixels_become_images() -> None:
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    pixels[1, 0, 3] = (255, 51, 0)
    images = preprocess(pixels)
    assert images.shape == (2, 3, 4, 4)
    assert images[0].unique().tolist() == [-1.0]
    torch.testing.assert_close(images[1, :, 0, 3], torch.tensor([1.0, -0.6, -1.0]))
    for wrong in (pixels.astype(np.float32), pixels[0], pixels.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"uint8 of shape \(images, height, width, 3\)"):
            preprocess(wrong)


@pytest.mark.parametrize("overrides", [(), RESNET10])
def test_other_images_are_refused(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    encoder = load_encoder(published(tmp_path, tiny_trained(*overrides)))
    images = torch.zeros(2, 3, 32, 32)
    wrong = (images.byte(), images[:, :1], images[:, :, :16], images[0], torch.zeros(2, 3, 64, 64))
    for other in wrong:
        with pytest.raises(ValueError, match=r"\(images, 3, 32, 32\).*got torch\.\w+ of shape"):
            encoder(other)


# --- its subsets ----------------------------------------------------------------------------------


def test_subsets_are_views_with_the_names_of_exported_columns(release: Path) -> None:
    encoder = load_encoder(release)
    assert [tuple(subset) for subset in encoder.partition] == [
        ("z000", (0, 50), (0, 8)),
        ("z001", (50, 300), (8, 16)),
        ("z002", (300, 1000), (16, 24)),
    ]
    z = torch.arange(48.0).reshape(2, 24)
    parts = encoder.subsets(z)
    assert list(parts) == ["z000", "z001", "z002"]
    assert torch.equal(parts["z001"], z[:, 8:16])
    parts["z001"].zero_()
    assert z[:, 8:16].abs().max() == 0, "a subset is a view"


@pytest.mark.parametrize(
    ("start", "end"), [(0, 50), (0, 51), (49, 50), (50, 51), (60, 299), (299, 301), (0, 1000)]
)
def test_a_range_of_time_steps_means_every_subset_that_it_touches(
    release: Path, start: int, end: int
) -> None:
    encoder = load_encoder(release)
    z = torch.arange(48.0).reshape(2, 24)
    chosen = tiny_trained().partition.select(start, end)
    wanted = z[:, chosen[0].dims[0] : chosen[-1].dims[1]]
    found = encoder.select(z, start, end)
    assert torch.equal(found, wanted)
    assert found.data_ptr() == wanted.data_ptr()


def test_what_is_not_there_is_refused(release: Path) -> None:
    encoder = load_encoder(release)
    z = torch.zeros(2, 24)
    for start, end in ((-1, 5), (5, 5), (0, 1001), (10, 5)):
        with pytest.raises(ValueError, match=r"inside \[0, 1000\), got"):
            encoder.select(z, start, end)
    for use in (encoder.subsets, lambda z: encoder.select(z, 0, 5)):
        with pytest.raises(ValueError, match="24 dimensions, got shape"):
            use(z[:, :23])


def test_subsets_without_a_dimension_are_left_out_as_in_exported_features(tmp_path: Path) -> None:
    config = changed(RUN_CONFIG, "ssl_config", k=10, dims_per_stage="2,22", stages="300,1000")
    trained = load_published_encoder(write_run(tmp_path, config=config))
    encoder = load_encoder(published(tmp_path, trained))
    assert encoder.partition[0].timesteps == (0, 300)
    assert [subset.name for subset in encoder.partition] == [f"z{n:03d}" for n in range(8)]
    assert encoder.partition[-1].dims[1] == 24


# --- from torch alone -----------------------------------------------------------------------------

ALONE = """
import sys
allowed = set(sys.stdlib_module_names) | set({allowed!r})
class OnlyTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError("not here: " + name, name=name)
sys.meta_path.insert(0, OnlyTorch())
for name in ("numpy", "safetensors", "pydantic", "yaml", "ray", "configs", "pretrain", "tools"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name + " can be imported here, so this proves nothing")
import torch
torch.set_num_threads(1)
pixels = torch.load("../pixels.pt", weights_only=True)
sys.path.insert(0, ".")
{example}
assert diti_encoder.__file__.endswith("release/diti_encoder.py")
torch.save([z, first, early], "../found.pt")
"""


def test_the_example_on_the_card_runs_with_torch_and_that_folder_alone(tmp_path: Path) -> None:
    trained = tiny_trained()
    folder = published(tmp_path, trained)
    example = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    pixels = random_pixels(32)
    torch.save(pixels, tmp_path / "pixels.pt")
    code = ALONE.format(
        allowed=sorted(TORCH_IMPORTS | {"diti_encoder"}), example="import diti_encoder\n" + example
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    z, first, early = torch.load(tmp_path / "found.pt", weights_only=True)
    wanted = trained.encoder(preprocess(pixels))
    torch.testing.assert_close(z, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(first, z[:, :8])
    assert torch.equal(early, z), "time-steps 0 to 499 touch all three subsets"


def test_the_module_is_copied_as_it_is_and_is_plain_python_3_9(release: Path) -> None:
    source = Path(released_encoder.__file__).read_text()
    assert (release / "diti_encoder.py").read_text() == source
    tree = ast.parse(source, feature_version=(3, 9))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names])
    }  # fmt: skip
    assert imported - sys.stdlib_module_names == {"torch"}


# --- hostile folders ------------------------------------------------------------------------------

Header = dict[str, Any]


@pytest.fixture
def folder(release: Path, tmp_path: Path) -> Path:
    """A copy of it, to be harmed."""
    return Path(shutil.copytree(release, tmp_path / "copy"))


def change_json(folder: Path, **values: Any) -> None:
    path = folder / "encoder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace_weights(folder: Path, data: bytes) -> None:
    """Other weights, with the digest that belongs to them."""
    (folder / "encoder.safetensors").write_bytes(data)
    change_json(folder, weights_sha256=hashlib.sha256(data).hexdigest())


def change_weights(folder: Path, change: Callable[[Header], object], *, more: bytes = b"") -> None:
    data = (folder / "encoder.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    replace_weights(folder, struct.pack("<Q", len(text)) + text + data[8 + length :] + more)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ReleaseError) as error:
        load_encoder(folder)
    message = str(error.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message, message


def first_of(header: Header) -> Any:
    return header["encoder.0.weight"]


def test_an_unchanged_copy_is_accepted(folder: Path) -> None:
    change_weights(folder, lambda header: header.update(__metadata__={"by": "another writer"}))
    load_encoder(folder)


def test_a_file_that_is_missing_or_another_is_named(folder: Path, tmp_path: Path) -> None:
    path = folder / "encoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(folder, "encoder.safetensors has SHA-256", "copy the whole folder again")
    path.unlink()
    refused(folder, "encoder.safetensors does not exist")
    (folder / "encoder.json").unlink()
    refused(folder, "encoder.json does not exist")
    refused(tmp_path / "nowhere", "encoder.json does not exist")


def swap(header: Header, key: str, value: Any) -> None:
    first_of(header)[key] = value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: swap(h, "dtype", "F16"), ["'F16'", "only ['F32', 'I64'] are read"]),
        (lambda h: swap(h, "dtype", "I64"), ["lies at"]),
        (lambda h: swap(h, "dtype", ["F32"]), ["unhashable"]),
        (lambda h: swap(h, "shape", [32, 3, 3, 4]), ["of 4608 bytes lies at"]),
        (lambda h: swap(h, "shape", [3, 32, 3, 3]), ["[3, 32, 3, 3]", "[32, 3, 3, 3]"]),
        (lambda h: swap(h, "shape", [-32, -3, 3, 3]), ["a shape must be a whole number"]),
        (lambda h: swap(h, "shape", [32.0, 3, 3, 3]), ["a shape must be a whole number"]),
        (lambda h: swap(h, "shape", [1] * 100_000), ["has 100000 dimensions"]),
        (lambda h: swap(h, "shape", 7), ["cannot be used"]),
        (lambda h: swap(h, "data_offsets", [0, 2**62]), ["lies at"]),
        (lambda h: swap(h, "data_offsets", [-3456, 0]), ["lies at"]),
        (lambda h: swap(h, "data_offsets", h["encoder.1.bias"]["data_offsets"]), ["is free"]),
        (lambda h: swap(h, "data_offsets", [0.0, 3456.0]), ["is free"]),
        (lambda h: swap(h, "data_offsets", [0]), ["cannot be used"]),
        (lambda h: h.update(extra=first_of(h)), ["is free"]),
        (lambda h: h.update(extra=7), ["cannot be used"]),
        (lambda h: h.pop("encoder.0.weight"), ["is free"]),
        (lambda h: h.update(other=h.pop("encoder.0.weight")), ["encoder.0.weight' is missing"]),
        (lambda h: swap(h, "shape", [864]), ["is F32 [864], the encoder has F32 [32, 3, 3, 3]"]),
    ],
)  # fmt: skip
def test_weights_that_lie_about_themselves_are_refused(
    folder: Path, change: Callable[[Header], object], words: list[str]
) -> None:
    change_weights(folder, change)
    refused(folder, "encoder.safetensors cannot be used", *words)


def test_weights_that_are_no_safetensors_file_are_refused(folder: Path) -> None:
    data = (folder / "encoder.safetensors").read_bytes()
    for content, word in (
        (b"", "0 bytes cannot hold a header"),
        (data[:7], "7 bytes cannot hold a header"),
        (data[:100], "cannot hold a header"),
        (data[:-4], "lies at"),
        (data + b"\0" * 4, "4 bytes at its end belong to no tensor"),
        (struct.pack("<Q", 2**63) + data[8:], f"header of {2**63} bytes"),
        (struct.pack("<Q", 2**20 + 1) + b" " * 2**21, f"header of {2**20 + 1} bytes"),
        (struct.pack("<Q", 8) + b"[1, 2, 3]", "cannot be used"),
        (struct.pack("<Q", 2) + b"[]", "JSON object"),
        (struct.pack("<Q", 2) + b"{}", "is missing, the encoder has"),
        (struct.pack("<Q", 4) + b"\xff\xff\xff\xff", "utf-8"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "nested too deeply"),
        (b"PK\x03\x04" + data, "cannot hold a header"),
    ):
        replace_weights(folder, content)
        refused(folder, "encoder.safetensors cannot be used", word)


SUBSET = {"name": "z000", "timesteps": [0, 1000], "dims": [0, 24]}
LAST = {"name": "z000", "timesteps": [1000, 1001], "dims": [9, 24]}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"format": "x"}, ["it is of format 'x' 1"]),
        ({"format_version": 2}, ["format 'diti-encoder' 2", "this code reads 'diti-encoder' 1"]),
        ({"architecture": {"kind": "vit"}}, ["'vit' is neither conv nor resnet10"]),
        ({"architecture": {"kind": "conv"}}, ["lacks 'channels'"]),
        ({"architecture": None}, ["cannot be used"]),
        ({"architecture": {"kind": "resnet10"}}, ["has 512 dimensions, not 24"]),
        ({"image_size_px": 2**40}, ["image_size_px must be a whole number"]),
        ({"image_size_px": 33}, ["halvings do not divide 33 px"]),
        ({"latent_dim": "24"}, ["latent_dim must be a whole number"]),
        ({"subsets": []}, ["hold 0 of 24 dimensions"]),
        ({"subsets": [SUBSET | {"dims": [0, 23]}]}, ["hold 23 of 24"]),
        ({"subsets": [SUBSET | {"dims": [1, 24]}]}, ["does not begin where"]),
        ({"subsets": [SUBSET | {"timesteps": [0, 0]}]}, ["a time-step must be"]),
        ({"subsets": [SUBSET | {"name": 7}]}, ["does not begin where"]),
        ({"subsets": [SUBSET | {"dims": [0, 9]}, LAST]}, ["share a name"]),
        ({"weights_sha256": None}, ["beside it names None"]),
    ],
)  # fmt: skip
def test_a_description_that_cannot_be_true_is_refused(
    folder: Path, values: dict[str, Any], words: list[str]
) -> None:
    change_json(folder, **values)
    refused(folder, *words)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"channels": [2**16] * 3}, "is F32 [32], the encoder has F32 [65536]"),
        ({"channels": [2**17] * 3}, "channels must be a whole number"),
        ({"channels": [32] * 100_000}, "100000 halvings"),
        ({"channels": [33, 32, 32]}, "divisible"),
        ({"attention_after": 4}, "attention_after 4 comes after the last"),
        ({"num_heads": 5}, "5 heads do not divide 32 channels"),
        ({"num_heads": None}, "num_heads must be a whole number"),
        ({"attention_after": None}, "is missing, the encoder has F32 [24]"),
    ],
)
def test_an_encoder_that_the_weights_are_not_of_costs_no_memory(
    folder: Path, values: dict[str, Any], word: str
) -> None:
    architecture = json.loads((folder / "encoder.json").read_text())["architecture"]
    change_json(folder, architecture=architecture | values)
    refused(folder, word)


def test_a_description_that_is_no_small_json_is_refused(folder: Path) -> None:
    path = folder / "encoder.json"
    for content, word in (
        (b"", "cannot be used"),
        (b"[]", "JSON object, not list"),
        (b"{}", "lacks 'format'"),
        (b"[" * 200_000, "nested too deeply"),
        (b" " * (2**20 + 1), "longer than 1048576 bytes"),
        (b"\xff{}", "utf-8"),
    ):
        path.write_bytes(content)
        refused(folder, "encoder.json cannot be used", word)
