"""The attention dispatcher: the right numbers, the kernel named, a refusal with its reason."""

import logging

import pytest
import torch
from torch import Tensor

from pretrain import attention
from pretrain.attention import (
    AttentionKernelError,
    Choice,
    choose_kernel,
    sdpa,
    xformers_attention,
)
from pretrain.unet import AttentionBlock

CPU = torch.device("cpu")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="pretrain.attention")
    return caplog


def said(log: pytest.LogCaptureFixture) -> list[str]:
    """What the dispatcher logged; xformers itself complains about its extension when imported."""
    return [record.message for record in log.records if record.name == "pretrain.attention"]


def as_a_block_makes_them(*, heads: int = 4, channels: int = 128, side: int = 4) -> list[Tensor]:
    """q, k and v, BHLK, with the strides that an AttentionBlock hands to its kernel."""
    torch.manual_seed(0)
    block = AttentionBlock(channels, num_heads=heads)
    taken: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        taken.extend((q, k, v))
        return v

    block.kernel = kernel
    with torch.no_grad():
        block(torch.randn(2, channels, side, side))
    return [3 * tensor for tensor in taken]


def slow_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention in float64, position by position."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    out = torch.empty_like(q)
    for index in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        b, h, position = index
        scores = torch.stack([q[b, h, position] @ key for key in k[b, h]]) / q.shape[-1] ** 0.5
        weights = scores.exp() / scores.exp().sum()
        out[b, h, position] = sum(w * value for w, value in zip(weights, v[b, h], strict=True))
    return out


def test_sdpa_is_softmax_attention():
    q, k, v = as_a_block_makes_them(heads=2, channels=32, side=2)
    out = sdpa(q, k, v).double()
    torch.testing.assert_close(out, slow_attention(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", ["auto", "sdpa"])
def test_a_cpu_gets_sdpa_and_the_log_says_so(choice: Choice, log):
    assert choose_kernel(choice, device=CPU, dtype=torch.bfloat16) is sdpa
    assert said(log) == ["attention: sdpa on cpu torch.bfloat16"]


def test_xformers_on_a_cpu_is_refused_with_the_reason_and_the_remedy(log):
    with pytest.raises(AttentionKernelError) as error:
        choose_kernel("xformers", device=CPU, dtype=torch.float32)
    message = str(error.value)
    assert message.startswith("engine.attention is 'xformers', but its kernel does not work on cpu")
    assert "device=cpu (supported: {'cuda'})" in message
    assert message.endswith("Set engine.attention to 'auto' or 'sdpa'.")
    assert "\n" not in message
    assert said(log) == []


def test_a_kernel_that_agrees_with_sdpa_is_used(log, monkeypatch: pytest.MonkeyPatch):
    def agrees(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v) + 1e-6

    monkeypatch.setattr(attention, "xformers_attention", agrees)
    assert choose_kernel("xformers", device=CPU, dtype=torch.float32) is agrees
    assert said(log) == ["attention: xformers on cpu torch.float32"]


@pytest.mark.parametrize(
    ("offset", "dtype"), [(1e-2, torch.float32), (0.5, torch.bfloat16), (torch.nan, torch.float32)]
)
def test_a_kernel_with_other_numbers_is_refused(
    offset: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "xformers_attention", lambda q, k, v: sdpa(q, k, v) + offset)
    with pytest.raises(AttentionKernelError, match="differs from SDPA by"):
        choose_kernel("xformers", device=CPU, dtype=dtype)


def test_a_kernel_that_fails_without_a_word_is_refused_by_the_errors_name(
    monkeypatch: pytest.MonkeyPatch,
):
    def fails(*_: Tensor) -> Tensor:
        raise NotImplementedError

    monkeypatch.setattr(attention, "xformers_attention", fails)
    with pytest.raises(AttentionKernelError, match=r"torch\.float32: NotImplementedError\. Set"):
        choose_kernel("xformers", device=CPU, dtype=torch.float32)


def test_xformers_gets_tensors_that_its_kernels_accept(monkeypatch: pytest.MonkeyPatch):
    """Asked of xformers itself: on this layout its only objection is the missing GPU."""
    xformers_ops = pytest.importorskip("xformers.ops")
    received: list[Tensor] = []

    def memory_efficient_attention(*qkv: Tensor) -> Tensor:
        received.extend(qkv)
        return qkv[2]

    monkeypatch.setattr(xformers_ops, "memory_efficient_attention", memory_efficient_attention)
    q, k, v = as_a_block_makes_them()
    assert q.stride(-1) != 1, "a block's tensors are not what this test is about"
    assert torch.equal(xformers_attention(q, k, v), v)
    for tensor, original in zip(received, (q, k, v), strict=True):
        assert torch.equal(tensor, original.transpose(1, 2))  # BLHK
    inputs = xformers_ops.fmha.Inputs(*received)
    for operator in (xformers_ops.fmha.cutlass.FwOp, xformers_ops.fmha.cutlass.BwOp):
        reasons = operator.not_supported_reasons(inputs)
        assert [reason for reason in reasons if not reason.startswith("device=cpu")] == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_xformers_equals_sdpa_on_a_gpu_forward_and_backward(dtype: torch.dtype, limit: float, log):
    device = torch.device("cuda")
    assert choose_kernel("xformers", device=device, dtype=dtype) is xformers_attention
    assert said(log) == [f"attention: xformers on cuda {dtype}"]
    results = []
    for kernel in (sdpa, xformers_attention):
        qkv = [x.to(device, dtype).requires_grad_() for x in as_a_block_makes_them(side=8)]
        out = kernel(*qkv)
        out.float().square().sum().backward()
        results.append([out, *(tensor.grad for tensor in qkv)])
    for expected, got in zip(*results, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=limit, atol=limit * scale)
