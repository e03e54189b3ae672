"""Ray's failures come out as ours, and what this machine lacks is refused instead of awaited."""

import os

import pytest
import ray

from cluster.session import ClusterError, ray_session, result_of


@ray.remote
class Actor:
    def refuse(self) -> None:
        raise ValueError("rule, value, place, remedy")

    def die(self) -> None:
        os._exit(1)


def test_what_an_actor_raised_is_raised_here_and_a_dead_one_is_a_cluster_error() -> None:
    with ray_session(num_cpus=1):
        actor = Actor.remote()
        with pytest.raises(ValueError, match=r"^rule, value, place, remedy$"):
            result_of(actor.refuse.remote())
        with pytest.raises(ClusterError, match="Ray failed"), ray_session(num_cpus=1):
            result_of(actor.die.remote())
        with pytest.raises(ValueError, match=r"wants 64 GPUs.*cluster\.use_gpu=false"):
            ray_session(num_cpus=1, num_gpus=64).__enter__()
    assert not ray.is_initialized()
