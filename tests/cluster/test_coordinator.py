"""What a run's coordinator remembers."""

from cluster.coordinator import ShardCoordinator
from data_pipelines.object_store import ObjectStore
from pretrain.progress import Pulse


def test_ranks_of_an_earlier_group_are_forgotten_when_another_begins() -> None:
    """After a group has shrunk, the silence of those that are gone would be a stall."""
    coordinator = ShardCoordinator(ObjectStore())
    for rank in range(4):
        coordinator.beat(Pulse(rank, "host", 1, step=3, phase="forward", seconds=1.0))
    coordinator.begin()
    coordinator.beat(Pulse(0, "host", 2, step=3, phase="forward", seconds=1.0))
    assert [pulse.rank for pulse, _ in coordinator.pulses()] == [0]
