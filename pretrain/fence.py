"""Whose turn it is to publish a run's checkpoints: the newest group's of the newest launch.

A launch is one start by a driver; a group are the workers that train together, which a launch may
have to start again. Both say in the run's folder that they have begun, each in a file that no other
launch writes. So workers of an earlier group that still run somewhere, cut off from the cluster,
cannot publish behind the back of those that replaced them, and a launch that was taken over cannot
take its turn back by starting its workers again.
"""

import json
import uuid
from dataclasses import dataclass

from data_pipelines.object_store import ObjectMissingError, ObjectStore, join
from pretrain.checkpoint import checkpoints_url, to_json
from pretrain.world import World, from_first_rank


class SupersededError(RuntimeError):
    """Another attempt of the same run has started; this one must not publish any more."""


@dataclass(frozen=True, slots=True)
class Fence:
    """The names of a launch and of its group."""

    launch: str
    group: str

    def launch_is_newest(self, store: ObjectStore, run_url: str) -> bool:
        return _said(store, _launch_url(run_url)) == self.launch

    def check(self, store: ObjectStore, run_url: str) -> None:
        """Raises SupersededError where it is another's turn, or nobody can tell."""
        urls = {_launch_url(run_url): self.launch, _group_url(run_url, self.launch): self.group}
        for url, own in urls.items():
            if (said := _said(store, url)) != own:
                raise SupersededError(
                    f"another attempt of the run at {run_url} has started "
                    f"({url.rpartition('/')[2]} there is now {said})"
                )


def claim(store: ObjectStore, run_url: str) -> str:
    """Say that a new launch has begun: from here on no earlier one publishes. Returns its name."""
    launch = uuid.uuid4().hex
    store.write(_launch_url(run_url), to_json({"attempt": launch}))
    return launch


def enter(store: ObjectStore, run_url: str, launch: str) -> Fence:
    """Say that a new group of this launch has begun: no earlier one of it publishes.

    Call it before the newest checkpoint is read: what it reads then is the last that an earlier
    group has published.

    Raises:
        SupersededError: a newer launch has begun.
    """
    fence = Fence(launch, uuid.uuid4().hex)
    store.write(_group_url(run_url, launch), to_json({"attempt": fence.group}))
    fence.check(store, run_url)
    return fence


def enter_together(store: ObjectStore, run_url: str, world: World, launch: str | None) -> Fence:
    """Collective: the same on every rank; without a driver this is a launch of its own.

    Raises:
        SupersededError: on every rank, as `enter`.
    """
    outcome: object = None
    if world.is_first:
        try:
            outcome = enter(store, run_url, launch or claim(store, run_url))
        except SupersededError as error:
            outcome = error
    outcome = from_first_rank(outcome)
    if isinstance(outcome, SupersededError):
        raise outcome
    assert isinstance(outcome, Fence)
    return outcome


def _said(store: ObjectStore, url: str) -> str:
    """The attempt that a file names; or what is there instead."""
    try:
        said = store.read(url)
    except ObjectMissingError:
        return "missing"
    try:
        return str(json.loads(said)["attempt"])
    except (ValueError, TypeError, LookupError):
        return "damaged"


def _launch_url(run_url: str) -> str:
    return join(checkpoints_url(run_url), "attempt.json")


def _group_url(run_url: str, launch: str) -> str:
    return join(checkpoints_url(run_url), f"attempt-{launch[:8]}.json")
