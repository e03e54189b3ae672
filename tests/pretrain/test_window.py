"""A hint where a rank waits for data, and none where it does not."""

from pretrain.window import starvation_hint


def test_no_hint_while_little_is_waited():
    assert starvation_hint(0.09, 1.0, 2) == ""
    assert starvation_hint(0.11, 1.0, 2)


def test_threads_that_never_rest_are_too_few():
    assert "from 2 to 4" in starvation_hint(0.5, 0.95, 2)
    assert "from 1 to 2" in starvation_hint(0.2, 0.95, 1), "one more at least"


def test_threads_that_rest_wait_for_storage():
    assert starvation_hint(0.5, 0.3, 2).startswith("storage-bound")
