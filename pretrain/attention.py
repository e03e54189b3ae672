"""The one place that runs attention: picks a kernel, proves it, says which.

Letters: B batch, H heads, L positions, K channels per head.
"""

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
Choice = Literal["auto", "xformers", "sdpa"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of activations, by `engine.precision`."""


class AttentionKernelError(ValueError):
    """The attention kernel that the configuration insists on does not work here."""


def sdpa(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
    """PyTorch's scaled dot-product attention; scale 1/sqrt(K), output BHLK."""
    return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK)


def xformers_attention(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
    """xformers' memory-efficient attention, which wants BLHK; output BHLK."""
    _load_cuda_12_runtime()
    from xformers.ops import memory_efficient_attention

    # Its kernels insist on a contiguous last axis; convolutions leave L there.
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BHLK, k_BHLK, v_BHLK))
    return memory_efficient_attention(q, k, v).transpose(1, 2)


@cache
def _load_cuda_12_runtime() -> None:
    """Beside the CUDA 13 of torch's wheels, for which there is no xformers yet.

    xformers offers no attention where its extension does not load, although the kernels themselves
    are torch's.
    """
    if (torch.version.cuda or "12").startswith("12"):
        return
    found = find_spec("nvidia.cuda_runtime")
    for folder in (found and found.submodule_search_locations) or ():
        ctypes.CDLL(str(Path(folder, "lib", "libcudart.so.12")))


def choose_kernel(choice: Choice, *, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel to use on this device and dtype, decided once by trying it.

    `auto` prefers xformers and falls back to SDPA; `xformers` is strict.

    Raises:
        AttentionKernelError: xformers was demanded but fails or gives other numbers than SDPA.
    """
    if choice == "sdpa" or (choice == "auto" and device.type == "cpu"):
        logger.info("attention: sdpa on %s %s", device, dtype)
        return sdpa
    reason = _why_xformers_fails(device, dtype)
    if reason is None:
        logger.info("attention: xformers on %s %s", device, dtype)
        return xformers_attention
    if choice == "xformers":
        raise AttentionKernelError(
            f"engine.attention is 'xformers', but its kernel does not work on {device} with "
            f"{dtype}: {reason}. Set engine.attention to 'auto' or 'sdpa'."
        )
    logger.info("attention: sdpa on %s %s (xformers: %s)", device, dtype, reason)
    return sdpa


def _why_xformers_fails(device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 64, 32)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    try:
        difference = (xformers_attention(q, k, v) - sdpa(q, k, v)).abs().max().item()
    except (ImportError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split()) or type(error).__name__  # xformers' reason comes last
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    if not difference <= limit:  # NaN is no agreement either
        return f"differs from SDPA by {difference:.2g} (limit {limit:g})"
    return None
