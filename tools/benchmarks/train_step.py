"""`python -m tools.benchmarks.train_step`: images per second of a training step, and of what part.

The CelebA-64 model in the published sizes with random weights takes steps on random images, twice:
as this project trains it, and the way the published code does (`plain_model`, Adam and the average
parameter by parameter). Each way has a process of its own and the two take turns, so that whatever
else the machine does falls on both. Time is CPU time wherever shares are formed.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from configs.task import BackboneConfig, DitiTask, EncoderConfig, ScheduleConfig, UNetConfig
from pretrain.backbone import Backbone
from pretrain.diti import DiTi
from pretrain.ema import Ema
from pretrain.encoder import Encoder
from pretrain.engine import keep_freed_memory
from pretrain.shift_decoder import ShiftDecoder
from pretrain.step_clock import StepClock, timed
from pretrain.unet import UNet
from tools.benchmarks import plain_model
from tools.benchmarks.peak import Operation, OperationList, best_cpu_seconds, measure_peak

Way = Literal["ours", "published"]
WAYS: tuple[Way, ...] = ("ours", "published")
PHASES = ("frozen forward", "encoder", "trainable forward", "backward", "optimizer", "EMA")
IMAGE_SIZE_PX = 64
CPU = torch.device("cpu")
EMA_DECAY = 0.9999
UNET = UNetConfig(
    base_channels=64,
    channel_multipliers=(1, 2, 4, 8),
    num_res_blocks=2,
    attention_factors=(4,),
    num_heads=1,
    dropout=0.1,
)
TASK = DitiTask(
    kind="diti",
    backbone=BackboneConfig(weights="random", sha256="0" * 64),
    encoder=EncoderConfig(latent_dim=512, channels=(64, 128, 128, 128), attention_after=2),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One way of training, over the measured steps."""

    cpu_seconds_per_step: float
    """Median."""
    images_per_second: float
    """Of the fastest step, by the clock on the wall."""
    phases_cpu_seconds: dict[str, float]
    """Medians."""
    peak_rss_gib: float
    executed_gflop_per_image: float


@dataclass(frozen=True, slots=True)
class Report:
    """What the command prints."""

    batch: int
    threads: int
    steps: int
    model_gflop_per_image: float
    peak_gflops: float
    matrix_product_gflops: float
    """Of two 2048 x 2048 matrices."""
    ways: dict[Way, Measured]

    def speed(self, way: Way) -> float:
        """Images per CPU second."""
        return self.batch / self.ways[way].cpu_seconds_per_step

    def share_of_peak(self, way: Way) -> float:
        """The model's FLOPs, whichever were really executed, per CPU second and peak."""
        return self.speed(way) * self.model_gflop_per_image / self.peak_gflops

    def executed_share_of_peak(self, way: Way) -> float:
        """The same, counting the FLOPs that were executed."""
        return self.speed(way) * self.ways[way].executed_gflop_per_image / self.peak_gflops


def make_clock() -> StepClock:
    """CPU seconds of each of `PHASES`, and of what is in none of them."""
    return StepClock(torch.device("cpu"), (*PHASES, "other"), time.process_time)


class Trainer:
    """One model that takes steps in one of the two ways."""

    def __init__(self, way: Way, batch: int, device: torch.device = CPU) -> None:
        torch.manual_seed(0)
        self.way = way
        self.clock = make_clock()
        self.model = make_model()
        self.model.tables_to(device)
        self.model.decoder.trunk.to(device)
        self.model.to(device)
        if way == "published":
            take_the_plain_way(self.model)
        for part, method, name in (
            (self.model.decoder.trunk, "forward", "frozen forward"),
            (self.model.encoder, "forward", "encoder"),
        ):
            setattr(part, method, timed(self.clock, name, getattr(part, method)))
        self.trained = list(self.model.parameters())
        self.adam = torch.optim.AdamW(
            self.trained, lr=1e-4, weight_decay=0.0, fused=True if way == "ours" else None
        )
        self.ema = Ema(self._values(), EMA_DECAY)
        self.images = (torch.rand(batch, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX) * 2 - 1).to(device)
        self.noise = torch.randn(self.images.shape).to(device)
        self.t_B = torch.randint(0, 1000, (batch,)).to(device)

    def step(self) -> None:
        """What `Engine.step` and `Ema.update` do in a run."""
        with self.clock("trainable forward"):
            loss = self.model(self.images, self.t_B, self.noise).mean()
        with self.clock("backward"):
            loss.backward()
        with self.clock("optimizer"):
            self.adam.step()
            self.adam.zero_grad()
        with self.clock("EMA"):
            if self.way == "ours":
                self.ema.update()
            else:
                self._update_ema_one_by_one()

    def _update_ema_one_by_one(self) -> None:
        for average, value in zip(self.ema.tensors, self._values(), strict=True):
            average.copy_(average * EMA_DECAY + value * (1 - EMA_DECAY))

    def _values(self) -> list[Tensor]:
        return [parameter.data for parameter in self.trained]


def make_model(config: UNetConfig = UNET) -> DiTi:
    """The CelebA-64 model in training mode; no weight is left at its zero start."""
    unet = UNet(config).requires_grad_(False).eval()
    model = DiTi(
        TASK, Backbone(unet, ScheduleConfig(), IMAGE_SIZE_PX, ""), image_size_px=IMAGE_SIZE_PX
    )
    for parameter in (*unet.parameters(), *model.parameters()):
        if parameter.ndim > 1 and not parameter.is_meta and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def take_the_plain_way(model: DiTi) -> None:
    """Replace the passes of the networks by those of `plain_model`, over the same parameters."""
    decoder, encoder = model.decoder, model.encoder
    assert isinstance(encoder, Encoder)
    assert isinstance(decoder, ShiftDecoder)
    plain_look = torch.no_grad()(partial(plain_model.look, decoder.backbone))
    for part, method, plain in (
        (decoder.trunk, "forward", plain_look),
        (decoder, "forward", partial(plain_model.shift, decoder)),
        (encoder, "forward", partial(plain_model.encode, encoder)),
    ):
        setattr(part, method, plain)


def measure(batch: int, threads: int, steps: int) -> Report:
    """Take the steps, each way in its own process, in turns; then measure the machine's peak."""
    ways = _take_turns(batch, threads, steps)
    torch.set_num_threads(threads)
    keep_freed_memory()
    peak = measure_peak(model_operations(batch))
    square = torch.randn(2048, 2048)
    square_seconds = best_cpu_seconds(lambda: square @ square)
    return Report(
        batch=batch,
        threads=threads,
        steps=steps,
        model_gflop_per_image=peak.flops / batch / 1e9,
        peak_gflops=peak.flops_per_second / 1e9,
        matrix_product_gflops=2 * 2048**3 / square_seconds / 1e9,
        ways=ways,
    )


def _take_turns(batch: int, threads: int, steps: int) -> dict[Way, Measured]:
    context = multiprocessing.get_context("spawn")
    pipes: dict[Way, Connection] = {}
    for way in WAYS:
        pipes[way], far_end = context.Pipe()
        arguments = (way, batch, threads, far_end)
        context.Process(target=_work, args=arguments, daemon=True).start()
        far_end.close()  # so that `recv` fails if the worker dies
        pipes[way].recv()  # ready: one at a time, so that none warms up while the other does
    laps: dict[Way, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(steps):
        for way, pipe in pipes.items():
            pipe.send("step")
            laps[way].append(pipe.recv())
    ways: dict[Way, Measured] = {}
    for way, pipe in pipes.items():
        pipe.send("stop")
        ways[way] = _measured(batch, laps[way], *pipe.recv())
    return ways


def _work(way: Way, batch: int, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    if way == "ours":
        keep_freed_memory()
    trainer = Trainer(way, batch)
    with FlopCounterMode(display=False) as flops:
        trainer.step()
    trainer.step()
    pipe.send("ready")
    while pipe.recv() == "step":
        trainer.clock.close()
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        pipe.send({"wall": wall, "cpu": cpu, **trainer.clock.close()})
    peak_rss_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    pipe.send((peak_rss_gib, flops.get_total_flops() / batch / 1e9))


def _measured(
    batch: int, laps: list[dict[str, float]], peak_rss_gib: float, gflop_per_image: float
) -> Measured:
    return Measured(
        cpu_seconds_per_step=statistics.median(lap["cpu"] for lap in laps),
        images_per_second=batch / min(lap["wall"] for lap in laps),
        phases_cpu_seconds={name: statistics.median(lap[name] for lap in laps) for name in PHASES},
        peak_rss_gib=peak_rss_gib,
        executed_gflop_per_image=gflop_per_image,
    )


def model_operations(batch: int) -> Counter[Operation]:
    """Convolutions and matrix products of one forward and backward pass, written the plain way."""
    with torch.device("meta"):
        model = make_model()
        images = torch.empty(batch, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
        t_B = torch.empty(batch, dtype=torch.long)
    take_the_plain_way(model)
    with OperationList() as operations:
        frozen = model.decoder.look(images, t_B)
        model.decoder(frozen, model.encoder(images)).sum().backward()
    return operations.counts


def table(report: Report) -> str:
    """The report for people."""
    measured = [report.ways[way] for way in WAYS]
    rows = {
        "CPU seconds per step": [m.cpu_seconds_per_step for m in measured],
        **{f"  {name}": [m.phases_cpu_seconds[name] for m in measured] for name in PHASES},
        "images per CPU second": [report.speed(way) for way in WAYS],
        "images/s, fastest step": [m.images_per_second for m in measured],
        "peak RSS, GiB": [m.peak_rss_gib for m in measured],
        "GFLOP executed per image": [m.executed_gflop_per_image for m in measured],
        "share of peak": [report.share_of_peak(way) for way in WAYS],
        "  of what was executed": [report.executed_share_of_peak(way) for way in WAYS],
    }
    ratio = report.speed("ours") / report.speed("published")
    return "\n".join(
        [
            f"batch {report.batch}, {report.threads} thread(s), fp32, {report.steps} steps each",
            f"{'':26}{'ours':>10}{'published':>12}",
            *(f"{name:26}{ours:10.3f}{theirs:12.3f}" for name, (ours, theirs) in rows.items()),
            f"ours / published, images per CPU second: {ratio:.2f}",
            f"the model: {report.model_gflop_per_image:.1f} GFLOP per image and step",
            f"peak of this machine on the model's operations: {report.peak_gflops:.0f} GFLOP/s "
            f"(2048 x 2048 matrix product: {report.matrix_product_gflops:.0f})",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a training step of the CelebA-64 model.")
    parser.add_argument("--batch", type=int, default=8, help="images per step (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default 1)")
    parser.add_argument("--steps", type=int, default=5, help="measured steps each way (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    report = measure(args.batch, args.threads, args.steps)
    if args.json:
        shares: dict[str, float] = {way: report.share_of_peak(way) for way in WAYS}
        print(json.dumps(asdict(report) | {"share_of_peak": shares}, indent=2))
    else:
        print(table(report))


if __name__ == "__main__":
    main()
