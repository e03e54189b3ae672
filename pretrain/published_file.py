"""The tensors of a published checkpoint file, by part; nothing in the file is run.

What they mean, together with a config.yml, is said in `pretrain.published`.
"""

import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.backbone import first_few
from pretrain.published_config import LayoutError

_PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and of DistributedDataParallel
_FROZEN = ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.")
# Both wordings of PyTorch: of names it does not know, and of modules it blocks.
_GLOBAL_ASKED_FOR = re.compile(r"(?i)unsupported global:? (?:global )?([\w.]+)")


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of one file by part, before their meaning is known."""

    layout: Literal["dpm", "run", "adm"]
    step: int | None
    backbone: dict[str, Tensor]
    encoder: dict[str, Tensor]
    shift: dict[str, Tensor]
    is_diti: bool


def read_weights_only(path: Path) -> Any:
    """The file's content; a pickle that asks for more than tensors and plain values is refused."""
    damaged = (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        AssertionError,
        OverflowError,
        struct.error,
    )
    if zipped := zipfile.is_zipfile(path):
        _check_sums(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if found := _GLOBAL_ASKED_FOR.search(str(error)):
            asked = found[1].rstrip(".")
            raise LayoutError(
                f"it would run code when it is loaded (it asks for {asked}), so it is not; get a "
                f"file that holds tensors and plain values only"
            ) from error
        raise _not_whole(path) from error
    except damaged as error:
        raise _not_whole(path) from error


def _check_sums(path: Path) -> None:
    """PyTorch itself does not look at them."""
    try:
        with zipfile.ZipFile(path) as file:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist())
            damaged = None if packed else file.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError) as error:
        raise _not_whole(path) from error
    if packed:
        raise LayoutError(
            "it was compressed after PyTorch had written it, so its tensors cannot be read: unpack "
            "it and zip it again without compression, or fetch the original"
        )
    if damaged is not None:
        raise LayoutError(f"its part {damaged} is damaged (its CRC-32 is another): fetch it again")


def _not_whole(path: Path) -> LayoutError:
    return LayoutError(
        f"it is not a whole PyTorch checkpoint ({path.stat().st_size} bytes): truncated, damaged "
        f"or another kind of file; fetch it again"
    )


def take_apart(content: Any, *, ema: bool) -> Parts:
    """Recognise the layout by its keys and copy the tensors that are wanted."""
    if not isinstance(content, Mapping):
        raise LayoutError(
            f"it holds one {type(content).__name__}, not a dictionary of weights; give a "
            f"checkpoint of a DiTi or PDAE run, their denoiser's, or an ADM state dict"
        )
    keys = {str(key) for key in content}
    if keys & {"encoder", "ema_encoder"} and keys & {"decoder", "ema_decoder"}:
        decoder = _state(content, "decoder", ema=ema)
        frozen = {name: t for name, t in decoder.items() if name.startswith(_FROZEN)}
        return Parts(
            layout="run",
            step=_step(content),
            backbone=_copied(frozen),
            encoder=_copied(_state(content, "encoder", ema=ema)),
            shift=_copied({name: t for name, t in decoder.items() if name not in frozen}),
            is_diti="ssl_model" in keys,
        )
    if keys & {"denoise_fn", "ema_denoise_fn"}:
        backbone = _copied(_state(content, "denoise_fn", ema=ema))
        return Parts("dpm", _step(content), backbone, {}, {}, is_diti=False)
    if any(name.endswith("time_embed.0.weight") for name in keys):
        if not ema:
            raise LayoutError(
                "an ADM state dict holds one set of weights, so there are none without averaging "
                "to choose; leave that choice out"
            )
        return Parts("adm", None, _copied(_tensors(content, "it")), {}, {}, is_diti=False)
    raise LayoutError(
        f"its layout is unknown: the top-level keys are {first_few(sorted(keys))}. Known are runs "
        f"(encoder, decoder and their ema_ versions), denoisers (denoise_fn, ema_denoise_fn) and "
        f"bare ADM state dicts (time_embed.0.weight, ...)"
    )


def _state(content: Mapping[Any, Any], name: str, *, ema: bool) -> dict[str, Tensor]:
    key = f"ema_{name}" if ema else name
    if key not in content:
        other = "take the averaged ones" if not ema else "take the online ones (ema=False)"
        raise LayoutError(f"it has no {key}, only {first_few(sorted(map(str, content)))}; {other}")
    return _tensors(content[key], key)


def _tensors(state: Any, what: str) -> dict[str, Tensor]:
    """Names without wrappers' prefixes, to tensors."""
    if not isinstance(state, Mapping):
        raise LayoutError(f"{what} is a {type(state).__name__}, not a dictionary of tensors")
    strange = sorted(str(name) for name, value in state.items() if not isinstance(value, Tensor))
    if strange:
        raise LayoutError(f"{what} holds values that are no tensors: {first_few(strange)}")
    tensors = {_unwrapped(str(name)): value for name, value in state.items()}
    if len(tensors) != len(state):
        raise LayoutError(f"{what} holds tensors twice, with and without a wrapper's prefix")
    return tensors


def _unwrapped(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 copies that no longer lean on the file."""
    if strange := sorted(name for name, tensor in state.items() if not _is_plain(tensor)):
        raise LayoutError(
            f"it holds tensors that are sparse, quantized, repeated, without content or no "
            f"floating-point numbers: {first_few(strange)}; save them as plain numbers"
        )
    copies = {
        name: tensor.detach().to(torch.float32, copy=True).contiguous()
        for name, tensor in state.items()
    }
    if broken := sorted(name for name, tensor in copies.items() if not tensor.isfinite().all()):
        raise LayoutError(
            f"it holds numbers that are NaN, infinite or too large for float32: "
            f"{first_few(broken)}; take a checkpoint from before its training went wrong"
        )
    return copies


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and (tensor.is_floating_point() or tensor.dtype == torch.int64)  # BatchNorm's counts
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _step(content: Mapping[Any, Any]) -> int | None:
    step = content.get("step")
    if isinstance(step, Tensor) and step.numel() == 1:
        step = int(step.item())
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None
