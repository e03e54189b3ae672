"""Workers that come late, die, fail or are ended; all on real Ray."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError

from cluster.coordinator import NAMESPACE, NamedCoordinator, Work, start_coordinator
from cluster.leases import LEASE_SECONDS, QueueState
from cluster.session import last_line
from cluster.work import run_workers, work_off
from data_pipelines.object_store import ObjectStore
from tests.cluster.joining_driver import NUM_ITEMS
from tests.own_process import ROOT

STORE = ObjectStore()
ITEMS = tuple("abcdefgh")


class Worker:
    """Does each item with a function that is told the item and how to tell of it."""

    def __init__(self, folder: Path, do: Callable[[Path, str], Any], lanes: int = 1) -> None:
        self.folder, self.do, self.lanes = folder, do, lanes

    def work(self, name: str, coordinator: NamedCoordinator) -> None:
        def do(item: str) -> Any:
            (self.folder / f"{item} {name} {time.time_ns()}").touch()
            return self.do(self.folder, item)

        work_off(name, coordinator, do, lanes=self.lanes)


def begun(folder: Path) -> list[tuple[str, str]]:
    """(item, worker) of everything that was begun."""
    return [tuple(path.name.split()[:2]) for path in folder.iterdir()]


def written(folder: Path) -> list[str]:
    """The objects of a local folder; what is being written, or was left by a kill, is none."""
    return sorted(path.stem for path in folder.glob("[!.]*"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Room for two workers; tests may add some."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def worker(*arguments: Any, max_restarts: int = 0) -> Any:
    actor: Any = ray.remote(num_cpus=1, max_restarts=max_restarts, max_task_retries=3)(Worker)
    return actor.remote(*arguments)


def run(
    workers: list[Any],
    items: tuple[str, ...] = ITEMS,
    on_progress: Callable[[QueueState], None] = lambda state: None,
    out_url: str | None = None,
) -> tuple[QueueState, dict[str, Any]]:
    work = Work(items, out_url, ".txt")
    return run_workers(f"test-{time.time_ns()}", STORE, work, workers, on_progress)


def quick(folder: Path, item: str) -> str:
    time.sleep(0.1)
    return item.upper()


def quick_until_a_third_worker_is_needed(folder: Path, item: str) -> str:
    """From item 010 on nothing is done before three workers have begun something."""
    deadline = time.monotonic() + 60
    while item >= "010" and len({name for _, name in begun(folder)}) < 3:
        if time.monotonic() > deadline:
            raise AssertionError("no third worker has come in 60 s")
        time.sleep(0.05)
    return quick(folder, item)


def test_workers_without_room_are_not_waited_for_and_work_once_there_is_some(
    nodes: Cluster, tmp_path: Path
) -> None:
    added: list[Any] = []

    def add_a_node(state: QueueState) -> None:
        if state.done >= 5 and not added:
            added.append(nodes.add_node(num_cpus=1))

    items = tuple(f"{number:03d}" for number in range(20))
    workers = [worker(tmp_path, quick_until_a_third_worker_is_needed) for _ in range(5)]
    state, results = run(workers, items, add_a_node)
    nodes.remove_node(added[0])
    assert state == QueueState(0, 0, 20, {})
    assert results == {item: item for item in items}
    assert sorted(item for item, _ in begun(tmp_path)) == list(items)
    assert len({name for _, name in begun(tmp_path)}) == 3


def die_of_d_once(folder: Path, item: str) -> str:
    if item == "d" and not (folder / "dead worker 0").exists():
        (folder / "dead worker 0").touch()
        os._exit(1)
    return quick(folder, item)


def test_a_worker_that_is_dead_for_good_is_done_without(
    nodes: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    state, results = run([worker(tmp_path, die_of_d_once) for _ in range(2)])
    assert state == QueueState(0, 0, len(ITEMS), {})
    assert results.keys() == set(ITEMS)
    assert "died for good" in caplog.text
    assert "workers left: 1" in caplog.text
    assert time.monotonic() - start < LEASE_SECONDS / 2, "nobody has waited for its lease"
    killer, *others = [name for item, name in begun(tmp_path) if item == "d"]
    assert killer not in others


def die_of_d(folder: Path, item: str) -> str:
    if item == "d":
        os._exit(1)
    return quick(folder, item)


def test_a_worker_that_is_restarted_gives_back_what_it_held_until_that_is_named(
    nodes: Cluster, tmp_path: Path
) -> None:
    start = time.monotonic()
    state, results = run([worker(tmp_path, die_of_d, max_restarts=3)])
    assert time.monotonic() - start < LEASE_SECONDS / 2
    assert results.keys() == set(ITEMS) - {"d"}
    assert state.failures.keys() == {"d"}
    assert "died (attempt 3)" in state.failures["d"]
    order = sorted(tmp_path.iterdir(), key=lambda path: path.name.split()[-1])
    assert "".join(path.name[0] for path in order) == "abcdefghdd", "again at the end of the queue"


def test_when_every_worker_is_dead_for_good_the_work_stops(nodes: Cluster, tmp_path: Path) -> None:
    with pytest.raises(RayActorError) as error:
        run([worker(tmp_path, die_of_d) for _ in range(2)])
    assert not error.value.actor_init_failed
    assert [item for item, _ in begun(tmp_path)].count("d") == 2


class Refusing(Worker):
    def __init__(self, folder: Path, do: Callable[[Path, str], Any]) -> None:
        raise ValueError("rule, value, place, remedy")


def slow(folder: Path, item: str) -> None:
    time.sleep(60)


def test_a_worker_that_cannot_be_built_ends_the_work_at_once(
    nodes: Cluster, tmp_path: Path
) -> None:
    refusing: Any = ray.remote(num_cpus=1, max_restarts=3, max_task_retries=3)(Refusing)
    start = time.monotonic()
    with pytest.raises(RayActorError) as error:
        run([worker(tmp_path, slow), refusing.remote(tmp_path, slow)])
    assert last_line(error.value) == "ValueError: rule, value, place, remedy"
    assert time.monotonic() - start < 30


def break_at_b(folder: Path, item: str) -> None:
    if item == "b":
        raise ZeroDivisionError("a mistake of ours")
    slow(folder, item)


def test_a_mistake_in_one_lane_of_one_worker_ends_the_work_at_once(
    nodes: Cluster, tmp_path: Path
) -> None:
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match=r"^a mistake of ours$"):
        run([worker(tmp_path, break_at_b, 2) for _ in range(2)])
    assert time.monotonic() - start < 30


def refuse_b(folder: Path, item: str) -> str:
    if item == "b":
        raise ValueError("b is damaged")
    return quick(folder, item)


def test_what_an_item_itself_is_to_blame_for_is_told_at_the_end(
    nodes: Cluster, tmp_path: Path
) -> None:
    state, results = run([worker(tmp_path, refuse_b)])
    assert state == QueueState(0, 0, len(ITEMS) - 1, {"b": "b is damaged (attempt 3)"})
    assert "b" not in results


MEETING = threading.Barrier(3)


def meet(folder: Path, item: str) -> None:
    MEETING.wait(timeout=20)


def test_a_worker_has_as_many_items_in_hand_as_it_has_lanes(nodes: Cluster, tmp_path: Path) -> None:
    state, _ = run([worker(tmp_path, meet, 3)], tuple("abcdef"))
    assert state == QueueState(0, 0, 6, {})
    assert len({name for _, name in begun(tmp_path)}) == 1


def coordinator() -> Any:
    """The one that runs."""
    [name] = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE
    ]
    return ray.get_actor(name, namespace=NAMESPACE)


def write_part(folder: Path, item: str) -> None:
    quick(folder, item)
    STORE.write(str(folder.with_name("out") / f"{item}.txt"), b"")


def test_a_new_coordinator_knows_what_is_finished_and_takes_what_is_in_hand(
    nodes: Cluster, tmp_path: Path
) -> None:
    folder, out = tmp_path / "begun", tmp_path / "out"
    folder.mkdir()
    items = tuple(f"{number:03d}" for number in range(40))
    finished: list[str] = []

    def kill_it(state: QueueState) -> None:
        if state.done >= 10 and not finished:
            finished.extend(written(out))
            ray.kill(coordinator())  # as Ray does when its driver ends

    state, results = run([worker(folder, write_part) for _ in range(2)], items, kill_it, str(out))
    assert results == {}, "they are in storage"
    assert state.waiting == state.leased == len(state.failures) == 0
    assert written(out) == list(items)
    times = [item for item, _ in begun(folder)]
    assert len(finished) >= 10
    assert all(times.count(item) == 1 for item in finished)
    assert len(times) <= len(items) + 2, "what was in hand"


def wait_until(condition: Callable[[], bool], *drivers: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        for driver in drivers:
            assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def test_a_coordinator_of_many_items_is_rebuilt_as_often_as_it_dies(nodes: Cluster) -> None:
    """Its arguments are large, and Ray itself would restart such an actor once at the most."""
    items = tuple(f"{number:06d}" for number in range(50_000))
    many = NamedCoordinator("many", partial(start_coordinator, "many", STORE, work=Work(items)))
    try:
        for _ in range(3):
            assert many.ask(lambda actor: actor.lease.remote("one")) == "000000"
            ray.kill(coordinator(), no_restart=False)
            wait_until(lambda: many.ask(lambda actor: actor.work_state.remote()).waiting == 50_000)
    finally:
        many.end()


def refuse_b_until_mended(folder: Path, item: str) -> None:
    if item == "slow":
        time.sleep(5)
    elif not (folder / "mended").exists():
        raise ValueError("b is damaged")


def test_a_driver_that_joins_has_failures_tried_again_and_may_leave(
    nodes: Cluster, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def leave(state: QueueState) -> None:
        seen.append(state)
        raise KeyboardInterrupt

    def mend_and_join(state: QueueState) -> None:
        if not state.failures or seen:
            return
        (tmp_path / "mended").touch()
        seen.append(coordinator())
        pending = [worker(tmp_path, refuse_b_until_mended)]
        with pytest.raises(KeyboardInterrupt):
            run_workers("shared", STORE, work, pending, leave)
        seen.append(coordinator())

    work = Work(("slow", "b"), str(tmp_path / "out"))
    workers = [worker(tmp_path, refuse_b_until_mended) for _ in range(2)]
    state, _ = run_workers("shared", STORE, work, workers, mend_and_join)
    before, joined, after = seen
    assert before == after, "it has not been started again"
    assert not joined.failures
    assert state == QueueState(0, 0, 2, {})


def start_driver(cluster: Cluster, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.joining_driver", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_driver_that_joins_goes_on_when_the_first_one_is_killed(
    nodes: Cluster, tmp_path: Path
) -> None:
    node = nodes.add_node(num_cpus=2)
    log, parts = tmp_path / "begun", tmp_path / "parts"
    log.mkdir()

    def names() -> set[str]:
        return {path.name.split("-")[0] for path in log.iterdir()}

    first = start_driver(nodes, tmp_path)
    wait_until(lambda: len(names()) == 1, first)
    [firsts] = names()
    second = start_driver(nodes, tmp_path)
    wait_until(lambda: len(names()) == 2, first, second)
    finished = written(parts)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    killed_at = time.time()
    (tmp_path / "go").touch()
    try:
        said, _ = second.communicate(timeout=60)
    finally:
        second.kill()
        nodes.remove_node(node)
    assert second.returncode == 0, said
    assert written(parts) == [f"{n:05d}" for n in range(NUM_ITEMS)]
    begun_by = [path.name.split() for path in log.iterdir()]
    times = [item for _, item in begun_by]
    assert 0 < len(finished) <= NUM_ITEMS // 2, "the first one was killed in mid-work"
    assert all(times.count(item) == 1 for item in finished)
    assert len(times) <= NUM_ITEMS + 4, "what was in hand: two workers' each"
    late = [path for path in log.iterdir() if path.stat().st_mtime > killed_at + 2]
    assert not [path for path in late if path.name.startswith(firsts)], "its workers are gone"
