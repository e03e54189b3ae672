"""Training under Ray Train: workers, restarts, progress."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster.coordinator import NAMESPACE, start_coordinator
from cluster.session import interrupts_raised, last_line, ray_session, result_of
from configs.schema import RunConfig
from configs.task import DitiTask
from data_pipelines.bad_samples import TooManyBadSamplesError
from data_pipelines.object_store import StoreError, absolute
from data_pipelines.sample_order import legal_world_sizes
from pretrain import checkpoint
from pretrain.fence import SupersededError, claim
from pretrain.heartbeat import stalled
from pretrain.preflight import Preflight, open_store, preflight, run_url
from pretrain.progress import Progress
from pretrain.publisher import collect_orphans
from pretrain.train import TrainingDivergedError, Wish, run

POLL_SECONDS = 1.0
FOR_GOOD = (
    checkpoint.DamagedError,
    SupersededError,
    TrainingDivergedError,
    TooManyBadSamplesError,
)
_log = logging.getLogger(__name__)


class RunFailedError(RuntimeError):
    """Training stopped for good; the newest complete checkpoint is still there."""


class RunStoppedError(RuntimeError):
    """The run was asked to stop, has published a checkpoint, and can go on."""


def launch_training(
    config: RunConfig,
    *,
    local_dir: Path,
    from_step: int | None = None,
    allow_change: Sequence[str] = (),
    on_start: Callable[[Preflight], None] = lambda found: None,
    on_progress: Callable[[Mapping[int, Progress]], None] = lambda ranks: None,
) -> checkpoint.Manifest:
    """Run `config` on Ray with `cluster.num_workers` workers and wait for its end.

    A worker that dies takes the group with it; Ray starts the group again, up to
    `cluster.max_failures` times, and `pretrain.train.run` goes on from the last checkpoint.

    A second start of a run ends the first: that publishes nothing any more. A damaged checkpoint
    ends the run, or is set aside where `train.if_damaged` says so.

    Args:
        local_dir: folder on every node for wandb's and Ray's own files.
        from_step: go back to this complete checkpoint; later ones are superseded.
        allow_change: settings that may differ from those of the checkpoint, see
            `pretrain.resumable`.
        on_start: called once nothing is left to be refused but what only Ray knows, with what the
            checks found.
        on_progress: called about every second, from another thread, with each rank's progress.

    Raises:
        ValueError, OSError: refused before start, see `pretrain.preflight`.
        DamagedError: the checkpoint to go on from is not what was published.
        RunFailedError: the run failed more often than it may, or for good.
        RunStoppedError: SIGTERM, or somebody through the coordinator, has asked it to stop.
    """
    config = with_absolute_paths(config)
    store = open_store(config)
    while True:
        try:
            found = preflight(config, config.cluster.num_workers, allow_change, from_step)
            on_start(found)
            if found.is_done:
                if from_step is not None:
                    claim(store, run_url(config))
                    checkpoint.go_back(store, run_url(config), from_step)
                return checkpoint.find(store, run_url(config), None)
            # Once it has begun, the newest checkpoint is the one that may be found damaged.
            back_to, from_step = from_step, None
            return _train(config, found, local_dir, back_to, allow_change, on_progress)
        except checkpoint.DamagedError as error:
            older = checkpoint.next_older(store, run_url(config), from_step)
            if config.train.if_damaged == "stop" or older is None:
                raise
            _log.warning("%s. Going back to step %d (train.if_damaged).", error, older)
            from_step = older


def _train(
    config: RunConfig,
    found: Preflight,
    local_dir: Path,
    from_step: int | None,
    allow_change: Sequence[str],
    on_progress: Callable[[Mapping[int, Progress]], None],
) -> checkpoint.Manifest:
    store, cluster = open_store(config), config.cluster
    with ray_session(
        num_cpus=cluster.num_workers * cluster.cpus_per_worker,
        num_gpus=cluster.num_workers if cluster.use_gpu else 0,
    ):
        launch = claim(store, run_url(config))  # only now that nothing is left to be refused
        if from_step is not None:
            checkpoint.go_back(store, run_url(config), from_step)
        collect_orphans(store, run_url(config))
        name = f"coordinator-{config.name}-{launch[:8]}"  # not that of a launch still alive
        coordinator = start_coordinator(name, store, config.data.folders)
        result_of(coordinator.index.remote())
        watch = _Watch(coordinator, config, on_progress)
        try:
            stopping = _stops_when_terminated(coordinator, config.cluster.stop_seconds)
            with interrupts_raised(signal.SIGINT), stopping:
                _trainer(config, local_dir, allow_change, name, launch).fit()
            manifest = checkpoint.find(store, run_url(config), None)
        except (TrainingFailedError, StoreError) as error:
            raise _explain(config, error, watch.stalls, from_step) from error
        finally:
            watch.ended.set()
            ray.kill(coordinator)
    if manifest.step < found.plan.total_steps:
        raise RunStoppedError(
            f"run {config.name!r} was asked to stop: {manifest.name} is complete; "
            f"{_again(from_step)} to go on"
        )
    return manifest


@contextmanager
def _stops_when_terminated(coordinator: Any, seconds: float) -> Iterator[None]:
    """SIGTERM asks the run to publish and end; if that takes too long, it is as Ctrl-C is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True

    def ask(*_: object) -> None:
        coordinator.ask_to_stop.remote()
        if timer.ident is None:  # once: a second SIGTERM asks again, and waits no longer
            timer.start()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Ray Train's workers run in folders of their own, where relative paths would lead astray."""
    task = config.task
    if isinstance(task, DitiTask):
        task = task.model_copy(update={"backbone": task.backbone.moved(absolute)})
    if isinstance(task, DitiTask) and task.start_from is not None:
        task = task.model_copy(update={"start_from": absolute(task.start_from)})
    data = config.data.moved(absolute)
    return config.model_copy(update={"output": absolute(config.output), "data": data, "task": task})


def _trainer(
    config: RunConfig,
    local_dir: Path,
    allow_change: Sequence[str],
    coordinator_name: str,
    launch: str,
) -> TorchTrainer:
    cluster = config.cluster
    for patience in ("COLLECTIVE_TIMEOUT_S", "WORKER_HEALTH_CHECK_TIMEOUT_S"):
        # Ray Train's own waiting; it would be for ever, and for ten minutes.
        os.environ[f"RAY_TRAIN_{patience}"] = str(cluster.stall_seconds)
    # OMP_NUM_THREADS is Ray's default of 1 per worker unless it is told how many it may use.
    environment = {"OMP_NUM_THREADS": str(cluster.cpus_per_worker)}
    workers = cluster.num_workers
    arguments = {
        "config": config.model_dump_json(),
        "local_dir": str(local_dir),
        "allow_change": list(allow_change),
        "coordinator": coordinator_name,
        "launch": launch,
    }
    return _Trainer(
        _train_on_worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(
            backend="nccl" if cluster.use_gpu else "gloo", timeout_s=int(cluster.stall_seconds)
        ),
        scaling_config=ScalingConfig(
            num_workers=workers if cluster.min_workers is None else (cluster.min_workers, workers),
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker}
            | ({"GPU": 1} if cluster.use_gpu else {}),
            elastic_resize_monitor_interval_s=cluster.resize_seconds,
        ),
        run_config=RayRunConfig(
            name=config.name,
            # Ray keeps its own bookkeeping here; our checkpoints do not go through it.
            storage_path=str(local_dir / "ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": environment},
        ),
    )


class _Trainer(TorchTrainer):
    """Ray's, whose elastic worker group has only sizes that split the global batch, and which
    does not repeat what would fail again."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        assert self.run_config.failure_config is not None
        assert self.train_loop_config is not None
        arguments["failure_policy"] = _ForGood(
            self.run_config.failure_config,
            ray.get_actor(self.train_loop_config["coordinator"], namespace=NAMESPACE),
        )
        policy = arguments["scaling_policy"]
        if isinstance(policy, ElasticScalingPolicy):
            config = RunConfig.model_validate_json(self.train_loop_config["config"])
            legal = legal_world_sizes(config.train.global_batch)
            arguments["scaling_policy"] = _LegalSizes(policy.scaling_config, legal)
        return super()._initialize_and_run_controller(**arguments)


class _ForGood(DefaultFailurePolicy):
    """A worker's error that a restart would only meet again, or must not undo, ends the run. What
    is worth a restart is told to the coordinator."""

    def __init__(self, failure_config: FailureConfig, coordinator: Any) -> None:
        super().__init__(failure_config)
        self._coordinator = coordinator

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            causes = "; ".join(_causes(training_failed_error)) or last_line(training_failed_error)
            self._coordinator.failed.remote(
                f"{causes} (failure {self._worker_group_failures} of at most "
                f"{self.failure_config.max_failures})"
            )
        return decision

    def _is_retryable_error(self, training_failed_error: TrainingFailedError) -> bool:
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        if any(isinstance(failure, FOR_GOOD) for failure in failures):
            return False
        return super()._is_retryable_error(training_failed_error)


class _LegalSizes(ElasticScalingPolicy):
    """As many workers as there is room for, rounded down to a legal world size."""

    def __init__(self, scaling_config: ScalingConfig, legal: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self._legal = legal

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._legal if size <= possible), default=0)


def _train_on_worker(arguments: dict[str, Any]) -> None:
    config = RunConfig.model_validate_json(arguments["config"])
    if not config.cluster.use_gpu:
        torch.set_num_threads(config.cluster.cpus_per_worker)
    coordinator = ray.get_actor(arguments["coordinator"], namespace=NAMESPACE)
    if ray.train.get_context().get_world_rank() == 0:
        result_of(coordinator.begin.remote())
    run(
        config,
        local_dir=Path(arguments["local_dir"]),
        index=result_of(coordinator.index.remote()),
        report=coordinator.report.remote,
        beat=coordinator.beat.remote,
        asked=_asker(coordinator),
        allow_change=arguments["allow_change"],
        launch=arguments["launch"],
    )


def _asker(coordinator: Any) -> Callable[[], Wish]:
    """What Ray and the coordinator want; all ranks call it together."""
    is_first = ray.train.get_context().get_world_rank() == 0
    saved = False

    def ask() -> Wish:
        nonlocal saved
        leaving = ray.train.get_preemption_info() is not None  # Ray's own barrier
        if is_first and result_of(coordinator.stop_asked.remote()):
            return Wish.STOP
        wish = Wish.SAVE if leaving and not saved else Wish.GO_ON
        saved = leaving  # another notice is another save
        return wish

    return ask


class _Watch:
    """Polls the coordinator from a thread: progress is handed on, ranks that stall or fail are
    named."""

    def __init__(
        self,
        coordinator: Any,
        config: RunConfig,
        on_progress: Callable[[Mapping[int, Progress]], None],
    ) -> None:
        self.ended = threading.Event()
        self.stalls: list[str] = []
        """The ranks that the others wait for, or were waiting for when all fell silent."""
        self._failures_told = 0
        self._coordinator = coordinator
        self._after = config.cluster.stall_seconds / 2
        self._on_progress = on_progress
        threading.Thread(target=self._poll, name="progress", daemon=True).start()

    def _poll(self) -> None:
        while not self.ended.wait(POLL_SECONDS):
            try:
                actor = self._coordinator
                ranks, pulses, failures = result_of(
                    [actor.progress.remote(), actor.pulses.remote(), actor.failures.remote()],
                    timeout_seconds=10 * POLL_SECONDS,
                )
            except RayError:
                continue  # the actor is being restarted, or the session is closing
            for failure in failures[self._failures_told :]:
                _log.warning("workers are started again: %s", failure)
            self._failures_told = len(failures)
            if ranks and not self.ended.is_set():
                self._on_progress(ranks)
            found = stalled(pulses, self._after)
            if found and len(found) != len(self.stalls):
                _log.warning("the run has stalled: %s", "; ".join(found))
            self.stalls = self.stalls if found is None else found


def _causes(error: Exception) -> list[str]:
    """What each rank that failed has said last."""
    failures = getattr(error, "worker_failures", {})
    return [f"rank {rank}: {last_line(cause)}" for rank, cause in sorted(failures.items())]


def _explain(
    config: RunConfig, error: Exception, stalls: Sequence[str], from_step: int | None
) -> Exception:
    """In one line: what failed first on which rank, and where the run can go on from."""
    failures = getattr(error, "worker_failures", {})
    for cause in failures.values():
        if isinstance(cause, checkpoint.DamagedError):
            return checkpoint.DamagedError(last_line(cause))
        if isinstance(cause, FOR_GOOD):  # it says itself what can be done
            return RunFailedError(f"run {config.name!r} failed: {last_line(cause)}")
    reason = ("; ".join([*stalls, *_causes(error)]) or last_line(error)).rstrip(".")
    try:
        newest = checkpoint.newest(open_store(config), run_url(config))
        kept = f"step {newest.step}" if newest else ""
    except (StoreError, checkpoint.CheckpointError) as unreadable:
        kept = f"unknown ({unreadable})"
    goes_on = (
        f"Newest complete checkpoint: {kept}; {_again(from_step)} to go on from it."
        if kept
        else f"No checkpoint is complete yet: mend the cause, and {_again(from_step)}."
    )
    return RunFailedError(f"run {config.name!r} failed: {reason}. {goes_on}")


def _again(from_step: int | None) -> str:
    """How a run is continued; a second `--from-step` would go back a second time."""
    without = "" if from_step is None else " without --from-step"
    return f"run the same command again{without}"
