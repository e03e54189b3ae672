"""Ray's failures come out as ours, and what this machine lacks is refused instead of awaited."""

import os
import tempfile
from pathlib import Path

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


def test_a_cluster_somebody_else_started_on_this_machine_is_not_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # short: sockets lie in it
        monkeypatch.setenv("RAY_TMPDIR", folder)
        # What a Ray leaves behind that was killed, or one that runs: Ray's own default joins it.
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("192.0.2.1:6379")
        with ray_session(num_cpus=1):
            assert ray.cluster_resources()["CPU"] == 1
