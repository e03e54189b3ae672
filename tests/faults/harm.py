"""What faults are done to, and by."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.cluster_utils import Cluster

from cluster.coordinator import NAMESPACE
from pretrain.progress import Progress


class Once:
    """Does harm at the first report that is past some checkpoint."""

    def __init__(self, harm: Callable[[], object], past: int = 2) -> None:
        self.harm, self.past = harm, past
        self.done_at: int | None = None

    def __call__(self, ranks: Mapping[int, Progress]) -> None:
        newest = min(rank.checkpoint_step for rank in ranks.values())
        if self.done_at is None and newest >= self.past:
            self.done_at = max(rank.step for rank in ranks.values())
            self.harm()


@contextmanager
def ray_nodes(number: int) -> Iterator[Cluster]:
    """A cluster of a head without room for workers, and nodes with room for one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(number):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill_the_coordinator() -> None:
    """The one that runs; Ray starts it again."""
    [name] = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE
    ]
    ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=False)
