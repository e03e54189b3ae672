"""Bytes of each part, by hand, at both moments at which a step may be fullest."""

from configs.schema import EngineConfig, TrainConfig
from pretrain.activations import PassMemory
from pretrain.engine import BUCKET_NUMBERS, LIVE_NUMBERS
from pretrain.memory_plan import ModelSizes, in_host_memory, plan_memory
from pretrain.run_plan import plan_run

M = 10**6
LARGE, SMALL = (ModelSizes(100 * M, 40 * M, PassMemory(size, size + M)) for size in (9000 * M, M))


def plan(sizes: ModelSizes, workers: int = 4, micro_batch: int = 8, **engine: object):
    train = TrainConfig(
        total_images=64, global_batch=64, checkpoint_every_images=64, max_micro_batch=micro_batch
    )
    return plan_memory(sizes, EngineConfig.model_validate(engine), plan_run(train, workers))


def test_activations_are_the_most_where_images_are_large():
    found = plan(LARGE, workers=8, zero_stage=2)
    assert found == {
        "weights": 400 * M,
        "optimizer": 12 * 100 * M / 8,
        "average": 4 * 100 * M / 8,
        "backbone": 160 * M,
        "backbone, gathered": 0,
        "checkpoint": 16 * 100 * M / 8,
        "gradients": 0,
        "gradients, copied": 0,
        "activations": 9000 * M,
        "communication": 0,
    }
    assert plan(LARGE, workers=8, zero_stage=0)["activations"] == 9001 * M


def test_gradients_are_the_most_where_images_are_small():
    alone = plan(SMALL, workers=1, micro_batch=64, zero_stage=0)
    assert (alone["optimizer"], alone["average"]) == (800 * M, 400 * M)
    assert (alone["gradients"], alone["activations"], alone["communication"]) == (400 * M, 0, 0)
    assert plan(SMALL, zero_stage=0)["communication"] == 400 * M
    shared = plan(SMALL, zero_stage=2)
    assert (shared["gradients"], shared["gradients, copied"]) == (100 * M, 100 * M)
    assert shared["communication"] == 4 * BUCKET_NUMBERS


def test_gradients_stay_while_micro_batches_are_accumulated():
    found = plan(LARGE, workers=4, micro_batch=8, zero_stage=2)
    assert found["gradients"] == 100 * M
    assert found["communication"] == 4 * BUCKET_NUMBERS


def test_parts_of_weights_are_a_share_and_what_is_gathered():
    found = plan(SMALL, zero_stage=3, backbone="partitioned")
    assert found["weights"] == 4 * (25 * M + LIVE_NUMBERS)
    assert found["backbone"] == 4 * 10 * M
    assert found["backbone, gathered"] == 4 * LIVE_NUMBERS
    tiny = plan(ModelSizes(M, M, PassMemory(M, M)), zero_stage=3, backbone="offloaded")
    assert tiny["backbone"] + tiny["backbone, gathered"] == 4 * M, "never above whole"


def test_what_is_offloaded_lies_in_the_hosts_memory():
    def on_host(**engine: object) -> set[str]:
        return in_host_memory(EngineConfig.model_validate(engine))

    always = {"data", "checkpoint"}
    assert on_host(zero_stage=2) == always
    assert on_host(backbone="offloaded") == always | {"backbone"}
    moved = always | {"optimizer", "average", "gradients, copied"}
    assert on_host(zero_stage=2, offload_optimizer=True) == moved


def test_fewer_digits_halve_all_but_optimizer_and_average():
    full, half = (plan(LARGE, workers=8, precision=digits) for digits in ("fp32", "bf16"))
    for part in ("weights", "backbone", "activations"):
        assert half[part] == full[part] / 2
    for part in ("optimizer", "average"):
        assert half[part] == full[part]
