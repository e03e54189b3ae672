"""How what all ranks have is dealt out among them."""

import pytest

from pretrain.pieces import shared_out

WEIGHTS_AND_BIASES = [4096, 64, 8192, 64, 36864, 128, 73728, 128, 512, 512] * 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_every_piece_is_saved_once_and_every_rank_saves_about_as_much(world_size: int) -> None:
    shares = shared_out(WEIGHTS_AND_BIASES, world_size)
    assert sorted(number for share in shares for number in share) == list(range(30))
    held = [sum(WEIGHTS_AND_BIASES[number] for number in share) for share in shares]
    assert max(held) - min(held) <= max(WEIGHTS_AND_BIASES)
    assert max(held) < 1.2 * max(sum(held) / world_size, *WEIGHTS_AND_BIASES)


def test_more_ranks_than_pieces_leave_some_without() -> None:
    assert shared_out([5, 7], 4) == [[1], [0], [], []]
