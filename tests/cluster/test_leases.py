"""The work queue: a lease that is not renewed is taken back, a hopeless item is named."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.leases import LeaseQueue


def queue(*items: str, max_attempts: int = 3) -> LeaseQueue:
    return LeaseQueue(items, lease_seconds=10.0, max_attempts=max_attempts)


def counts(work: LeaseQueue, now: float) -> tuple[int, int, int, int]:
    state = work.state(now)
    return state.waiting, state.leased, state.done, len(state.failures)


def test_items_are_handed_out_once_and_in_order():
    work = queue("a", "b", "c")
    assert [work.lease("one", 0), work.lease("two", 0), work.lease("one", 1)] == ["a", "b", "c"]
    assert work.lease("two", 1) is None
    assert counts(work, 1) == (0, 3, 0, 0)


@pytest.mark.parametrize(("now", "still_held"), [(9.99, True), (10.0, False), (50.0, False)])
def test_a_lease_lasts_its_seconds_and_not_longer(now: float, still_held: bool):
    work = queue("a")
    work.lease("one", 0.0)
    assert work.lease("two", now) == (None if still_held else "a")


def test_renewing_prolongs_a_lease_from_then_on():
    work = queue("a")
    work.lease("one", 0)
    assert work.renew("one", "a", 9)
    assert work.lease("two", 18.9) is None
    assert work.renew("one", "a", 18.9)
    assert work.lease("two", 28.8) is None
    assert work.lease("two", 28.9) == "a"


def test_a_renewed_lease_outlasts_one_that_was_given_after_it():
    work = queue("a", "b")
    assert [work.lease("one", 0), work.lease("two", 1)] == ["a", "b"]
    assert work.renew("one", "a", 5)
    assert work.lease("three", 11) == "b"
    assert work.lease("three", 14.9) is None
    assert work.lease("three", 15) == "a"


def test_a_worker_that_lost_its_lease_is_told_so():
    work = queue("a")
    work.lease("one", 0)
    assert not work.renew("two", "a", 1), "another worker's lease"
    assert not work.renew("one", "b", 1), "no such item"
    assert not work.renew("one", "a", 10), "too late, even before someone else has it"
    assert work.lease("two", 11) == "a"
    assert not work.renew("one", "a", 12)
    assert work.renew("two", "a", 12)


def test_an_item_that_was_handed_out_too_often_fails_with_its_reason():
    work = queue("a", max_attempts=2)
    assert work.lease("one", 0) == "a"
    assert work.lease("two", 10) == "a"
    assert counts(work, 19) == (0, 1, 0, 0)
    assert work.lease("three", 20) is None
    assert work.state(20).failures == {"a": "worker two stopped renewing its lease (attempt 2)"}
    assert counts(work, 20) == (0, 0, 0, 1)


def test_an_item_that_is_given_back_goes_to_the_end_until_its_attempts_are_used_up():
    work = queue("a", "b", max_attempts=2)
    assert work.lease("one", 0) == "a"
    work.give_back("one", "a", "disk full")
    assert counts(work, 0) == (2, 0, 0, 0)
    assert [work.lease("one", 1), work.lease("one", 1)] == ["b", "a"]
    work.give_back("one", "a", "disk full again")
    assert work.state(1).failures == {"a": "disk full again (attempt 2)"}
    assert counts(work, 1) == (0, 1, 0, 1)


def test_only_the_holder_can_give_an_item_back():
    work = queue("a")
    work.lease("one", 0)
    work.give_back("two", "a", "not mine")
    assert counts(work, 1) == (0, 1, 0, 0)
    assert work.lease("two", 10) == "a"
    work.give_back("one", "a", "too late")
    assert counts(work, 10) == (0, 1, 0, 0)
    work.finish("a")
    work.give_back("two", "a", "after all")
    assert counts(work, 10) == (0, 0, 1, 0)


def test_a_result_counts_whoever_made_it():
    work = queue("a", "b", "c", max_attempts=1)
    work.lease("slow", 0)
    assert work.lease("quick", 10) == "b"
    assert work.state(10).failures.keys() == {"a"}
    work.finish("a")  # the slow worker did finish it
    assert work.state(10).failures == {}
    work.finish("c")  # nobody has it yet
    assert counts(work, 10) == (0, 1, 2, 0)
    work.finish("b")
    work.finish("b")
    assert counts(work, 10) == (0, 0, 3, 0)
    assert work.lease("quick", 11) is None
    assert not work.renew("quick", "b", 11)


def test_the_queue_is_finished_when_nothing_waits_and_nothing_is_held():
    work = queue("a", "b", max_attempts=1)
    assert not work.state(0).is_finished
    work.lease("one", 0)
    work.lease("one", 0)
    assert not work.state(9).is_finished
    work.finish("a")
    assert not work.state(9).is_finished
    assert work.state(10).is_finished, "the other one has failed"
    assert work.state(10).failures.keys() == {"b"}
    assert queue().state(0).is_finished


def test_a_state_is_a_copy():
    work = queue("a", max_attempts=1)
    work.lease("one", 0)
    work.state(10).failures.clear()
    assert work.state(10).failures.keys() == {"a"}


def test_what_a_dead_worker_held_goes_to_the_end_of_the_queue():
    work = queue("a", "b", "c", "d", max_attempts=2)
    assert [work.lease("one", 0), work.lease("two", 0), work.lease("one", 0)] == ["a", "b", "c"]
    work.release("one")
    assert counts(work, 0) == (3, 1, 0, 0), "the other one still holds b"
    assert not work.renew("one", "a", 1)
    assert [work.lease("three", 1) for _ in range(3)] == ["d", "a", "c"]
    work.release("one")
    work.release("nobody")
    assert counts(work, 1) == (0, 4, 0, 0), "it holds nothing any more"
    work.finish("a")
    work.release("three")
    assert work.state(1).failures == {"c": "worker three died (attempt 2)"}
    assert counts(work, 1) == (1, 1, 1, 1), "d has an attempt left"


def test_what_failed_is_tried_again_with_all_its_attempts():
    work = queue("a", "b", max_attempts=2)
    work.finish("b")
    for _ in range(2):
        assert work.lease("one", 0) == "a"
        work.give_back("one", "a", "no")
    assert work.state(0).failures == {"a": "no (attempt 2)"}
    work.retry_failed()
    assert counts(work, 0) == (1, 0, 1, 0)
    for _ in range(2):
        assert work.lease("two", 0) == "a"
        work.retry_failed()
        assert counts(work, 0) == (0, 1, 1, 0), "only what has failed"
        work.give_back("two", "a", "still not")
    assert work.state(0).failures == {"a": "still not (attempt 2)"}


def test_no_call_costs_more_because_there_are_many_items():
    """Half a million calls. Where one of them walks along a list, they take minutes."""
    items = [f"{number:05d}" for number in range(100_000)]
    work = LeaseQueue(items, lease_seconds=10.0, max_attempts=2)
    start = time.process_time()

    def each(of: list[str], call: Callable[[str, str], object]) -> None:
        for number, item in enumerate(of):
            call(f"worker-{number % 1000}", item)
            if number % 1000 == 0:
                assert time.process_time() - start < 6, "seconds; it takes one"

    each(items, lambda worker, item: work.lease(worker, 0))
    each(items, lambda worker, item: work.renew(worker, item, 1))
    each(items[:50_000], lambda worker, item: work.give_back(worker, item, "no"))
    each(items[49_999::-1], lambda worker, item: work.finish(item))  # the last that waits first
    each(items[50_000:], lambda worker, item: work.state(1))
    assert counts(work, 11) == (50_000, 0, 50_000, 0)  # all these leases have expired at once
    each(items[50_000:], lambda worker, item: work.lease(worker, 12))
    each(items[50_000:], lambda worker, item: work.finish(item))
    assert counts(work, 12) == (0, 0, 100_000, 0)


class SimpleQueue:
    """The same rules, written to be read: every call looks at every item."""

    def __init__(self, items: str, max_attempts: int) -> None:
        self.waiting, self.failed, self.done = list(items), [], set()
        self.leases: list[tuple[float, str, str]] = []  # (expires, worker, item)
        self.attempts = dict.fromkeys(items, 0)
        self.max_attempts = max_attempts

    def tick(self, now: float) -> None:
        for lease in sorted(self.leases, key=lambda lease: lease[0]):
            if lease[0] <= now:
                self.back(lease)

    def back(self, lease: tuple[float, str, str]) -> None:
        self.leases.remove(lease)
        item = lease[2]
        (self.failed if self.attempts[item] >= self.max_attempts else self.waiting).append(item)

    def held(self, worker: str) -> list[tuple[float, str, str]]:
        return [lease for lease in self.leases if lease[1] == worker]

    def lease(self, worker: str, now: float) -> str | None:
        if not self.waiting:
            return None
        item = self.waiting.pop(0)
        self.attempts[item] += 1
        self.leases.append((now + 10, worker, item))
        return item

    def renew(self, worker: str, item: str, now: float) -> bool:
        found = [lease for lease in self.held(worker) if lease[2] == item]
        for lease in found:
            self.leases.remove(lease)
            self.leases.append((now + 10, worker, item))
        return bool(found)

    def give_back(self, worker: str, item: str, reason: str) -> None:
        for lease in self.held(worker):
            if lease[2] == item:
                self.back(lease)

    def release(self, worker: str) -> None:
        for lease in self.held(worker):
            self.back(lease)

    def finish(self, item: str) -> None:
        self.waiting = [other for other in self.waiting if other != item]
        self.failed = [other for other in self.failed if other != item]
        self.leases = [lease for lease in self.leases if lease[2] != item]
        self.done.add(item)

    def retry_failed(self) -> None:
        self.attempts |= dict.fromkeys(self.failed, 0)
        self.waiting += self.failed
        self.failed = []


WORKERS = st.sampled_from(["one", "two"])
ITEMS = st.sampled_from("abc")
moves = st.one_of(
    st.tuples(st.just("lease"), WORKERS),
    st.tuples(st.just("lease"), WORKERS),
    st.tuples(st.just("renew"), WORKERS, ITEMS),
    st.tuples(st.just("renew"), WORKERS, ITEMS),
    st.tuples(st.just("give_back"), WORKERS, ITEMS, st.just("no")),
    st.tuples(st.just("finish"), ITEMS),
    st.tuples(st.just("release"), WORKERS),
    st.tuples(st.just("retry_failed")),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(moves, st.integers(0, 6)), max_size=60), st.integers(1, 3))
def test_whatever_happens_it_does_what_a_simple_queue_does(steps, max_attempts):
    ours, simple = queue(*"abc", max_attempts=max_attempts), SimpleQueue("abc", max_attempts)
    now = 0
    for (move, *arguments), passed in steps:
        now += passed
        simple.tick(now)
        if move in ("lease", "renew"):
            arguments.append(now)
        else:
            ours.state(now)  # these are told no time
        assert getattr(ours, move)(*arguments) == getattr(simple, move)(*arguments)
        state = ours.state(now)
        assert (state.waiting, state.leased) == (len(simple.waiting), len(simple.leases))
        assert (state.done, list(state.failures)) == (len(simple.done), simple.failed)
        assert state.waiting + state.leased + state.done + len(state.failures) == 3
