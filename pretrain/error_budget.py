"""How many samples had to be replaced, over all ranks, and when that is too many."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from data_pipelines.bad_samples import DeadLetter, TooManyBadSamplesError, ranked_causes
from pretrain.world import gather_from_ranks


class ErrorBudget:
    """Counts replaced samples; the counts of all ranks are the same after every `settle`.

    Args:
        share: of the samples read that may be replaced.
        at_least: samples that this share is of, while fewer have been read; such as an epoch.
        counts: replaced samples by cause, of the run so far.
    """

    def __init__(self, share: float, at_least: int, counts: Mapping[str, int]) -> None:
        self.share, self.at_least = share, at_least
        self.counts = Counter(counts)
        self._unsettled: Counter[str] = Counter()
        self._unwritten: list[DeadLetter] = []

    def note(self, letters: Iterable[DeadLetter]) -> None:
        """Take in this rank's new dead letters.

        A position counts once, by what was wrong with its own sample, however many substitutes
        could not be used either.
        """
        letters = list(letters)
        own = {letter.position: letter.cause for letter in reversed(letters)}
        self._unsettled.update(own.values())
        self._unwritten += letters

    def settle(self) -> int:
        """Collective: add what every rank has noted; replaced samples of the whole run so far."""
        for counts in gather_from_ranks(self._unsettled):
            assert isinstance(counts, Counter)
            self.counts += counts
        self._unsettled.clear()
        return self.counts.total()

    def check(self, samples_read: int) -> None:
        """Raises TooManyBadSamplesError, on every rank alike, when the budget is used up."""
        allowed = int(self.share * max(samples_read, self.at_least))
        if self.counts.total() > allowed:
            raise TooManyBadSamplesError(
                f"{self.counts.total()} samples could not be used, {allowed} are allowed "
                f"(data.error_budget = {self.share:g}): {ranked_causes(self.counts)}. The dead "
                f"letters in the run's folder say which and why; mend them and ask "
                f"`diti data repair`, or raise the budget (with --allow-change data.error_budget)."
            )

    def put_back(self, letters: Sequence[DeadLetter]) -> None:
        """Letters that are still to be written."""
        self._unwritten = [*letters, *self._unwritten]

    def take_unwritten(self) -> list[DeadLetter]:
        """This rank's dead letters since the last call."""
        taken, self._unwritten = self._unwritten, []
        return taken
