"""`python -m tools.benchmarks.full_size sd15`: one real pass of a public model in its full size.

The weights are random, the shapes are the public model's: the frozen U-Net and VAE, the copied
tail, the encoder of the LAION recipe. One image goes forward and back on the CPU. Printed are the
seconds, the most that the process held beside what `diti plan` predicts of it, and whether a byte
of the frozen weights moved. In bf16 it takes half the memory; a CPU without AVX-512 convolves in
bf16 at a fortieth of its pace in fp32.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import configs
from configs.loading import load_run
from configs.task import DitiTask
from data_pipelines.object_store import ObjectStore
from pretrain.attention import DTYPES
from pretrain.backbone import digest_of_state
from pretrain.diti import DiTi
from pretrain.frozen import untrained_frozen
from pretrain.inputs import zeros
from pretrain.memory_plan import sizes_of
from tools.benchmarks.memory import resident

RECIPES = {"sd15": "laion256_sd15", "sd21": "laion512_sd21", "sdxl": "laion1024_sdxl"}
"""U-Nets only: all that they hold are weights, which can be drawn anew."""
SPARE = 2**30
"""Bytes that are left to others."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass; memory in bytes."""

    trained: int
    frozen: int
    planned: int
    """Weights, gradients and activations."""
    peak: int
    """Beyond what the process held before there was a model."""
    forward_seconds: float
    backward_seconds: float
    loss: float
    gradient_norm: float
    frozen_before: str
    """Digest of all frozen weights."""
    frozen_after: str


def measure(task: DitiTask, image_size_px: int, dtype: torch.dtype) -> Pass:
    """Plan the pass, then take it with random weights.

    Raises:
        MemoryError: the plan is above what this machine has left.
    """
    planned_for = _on_meta(task, image_size_px)
    sizes = sizes_of(planned_for, image_size_px=image_size_px, micro_batch=1)
    numbers = sizes.trained + sizes.frozen
    planned = (4 * numbers + sizes.passes.with_gradients) * dtype.itemsize // 4
    left = _available() - SPARE
    if planned > left:
        raise MemoryError(
            f"the pass takes {planned / 2**30:.1f} GiB, and {left / 2**30:.1f} GiB are left here"
        )
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
    torch.manual_seed(0)
    model = _on_meta(task, image_size_px)
    for part in (model, *model.frozen):
        draw_weights(part, dtype)
    tail = model.decoder.tail
    assert isinstance(tail, nn.Module)
    for weight in tail.get_submodule("conv_out").parameters():
        nn.init.normal_(weight, std=0.02)  # at 0, as it begins, nothing behind it has a gradient
    _, t, noise = zeros(model, 1, image_size_px, "cpu")
    images = torch.rand(1, 3, image_size_px, image_size_px) * 2 - 1
    frozen_before = _digest(model)
    start = time.perf_counter()
    loss = model(images, t + 300, torch.randn_like(noise)).mean()
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    squares = [
        w.grad.float().square().sum().item() for w in model.parameters() if w.grad is not None
    ]
    return Pass(
        trained=sizes.trained,
        frozen=sizes.frozen,
        planned=planned,
        peak=resident("VmHWM") - before,
        forward_seconds=middle - start,
        backward_seconds=end - middle,
        loss=loss.item(),
        gradient_norm=math.sqrt(sum(squares)),
        frozen_before=frozen_before,
        frozen_after=_digest(model),
    )


def draw_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module on the meta device memory, and its layers weights as torch begins with."""
    module.to(dtype).to_empty(device="cpu")
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            nn.init.normal_(weight, std=0.02)
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()


def _on_meta(task: DitiTask, image_size_px: int) -> DiTi:
    frozen = untrained_frozen(ObjectStore(), task.backbone, image_size_px)
    with torch.device("meta"):
        return DiTi(task, frozen, image_size_px=image_size_px)


def _digest(model: DiTi) -> str:
    parts = enumerate(model.frozen)
    return digest_of_state({f"{i}.{k}": v for i, p in parts for k, v in p.state_dict().items()})


def _available() -> int:
    """Bytes that this machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo does not tell MemAvailable")


def lines(found: Pass) -> str:
    """For people."""
    moved = "did not move" if found.frozen_before == found.frozen_after else "MOVED"
    return (
        f"{found.trained:,} parameters trained, {found.frozen:,} frozen\n"
        f"forward {found.forward_seconds:.1f} s, backward {found.backward_seconds:.1f} s, "
        f"loss {found.loss:.4f}, gradient norm {found.gradient_norm:.4g}\n"
        f"peak {found.peak / 2**20:,.0f} MiB, planned {found.planned / 2**20:,.0f} "
        f"(measured / planned {found.peak / found.planned:.2f})\n"
        f"frozen weights {moved}: {found.frozen_before[:16]}, then {found.frozen_after[:16]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="One pass of a public model in its full size.")
    parser.add_argument("model", choices=list(RECIPES), help="shapes of this one")
    parser.add_argument("--image-size", type=int, help="pixels (default: the recipe's)")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="default fp32")
    parser.add_argument("overrides", nargs="*", help="of the recipe, as task.encoder.size=S")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_intermixed_args()
    run = load_run(
        Path(configs.__file__).parent / "runs" / f"{RECIPES[args.model]}.yaml", args.overrides
    )
    assert isinstance(run.task, DitiTask)
    size = args.image_size or run.data.image_size_px
    try:
        found = measure(run.task, size, DTYPES[args.dtype])
    except (ValueError, MemoryError) as error:
        parser.error(str(error))
    print(json.dumps(asdict(found), indent=1) if args.json else lines(found))


if __name__ == "__main__":
    main()
