"""Lines that travel with checkpoints: object stores cannot append."""

from collections.abc import Iterable


class Journal:
    """Lines since the newest complete checkpoint; the next one takes them along.

    Until that one is complete they stay, so that the one after it has them if it fails.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._taken = 0

    def add(self, lines: Iterable[str]) -> None:
        self._lines += lines

    def take(self) -> str:
        """Everything so far, a line each."""
        self._taken = len(self._lines)
        return "".join(line + "\n" for line in self._lines)

    def forget_taken(self) -> None:
        """The checkpoint that took them is complete."""
        del self._lines[: self._taken]
        self._taken = 0
