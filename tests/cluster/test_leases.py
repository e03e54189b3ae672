"""The work queue: a lease that is not renewed is taken back, a hopeless item is named."""

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


WORKERS = st.sampled_from(["one", "two", "three"])
ITEMS = st.sampled_from("abcd")
moves = st.one_of(
    st.tuples(st.just("lease"), WORKERS),
    st.tuples(st.just("renew"), WORKERS, ITEMS),
    st.tuples(st.just("give_back"), WORKERS, ITEMS),
    st.tuples(st.just("finish"), ITEMS),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(moves, st.floats(0, 8)), max_size=60), st.integers(1, 3))
def test_whatever_happens_each_item_is_in_one_state_and_one_pair_of_hands(steps, max_attempts):
    work = queue(*"abcd", max_attempts=max_attempts)
    now, held, handed_out = 0.0, {}, dict.fromkeys("abcd", 0)
    for (move, *arguments), passed in steps:
        now += passed
        if move == "lease":
            item = work.lease(arguments[0], now)
            if item is not None:
                assert not (item in held and held[item][1] > now), "two workers hold one item"
                held[item] = (arguments[0], now + 10)
                handed_out[item] += 1
        elif move == "renew":
            worker, item = arguments
            holds = item in held and held[item][0] == worker and held[item][1] > now
            assert work.renew(worker, item, now) == holds
            if holds:
                held[item] = (worker, now + 10)
        elif move == "give_back":
            worker, item = arguments
            work.give_back(worker, item, "no")
            if item in held and held[item][0] == worker:
                del held[item]
        else:
            work.finish(arguments[0])
            held.pop(arguments[0], None)
        state = work.state(now)
        assert state.waiting + state.leased + state.done + len(state.failures) == 4
        assert state.leased == sum(expires > now for _, expires in held.values())
        assert max(handed_out.values()) <= max_attempts
