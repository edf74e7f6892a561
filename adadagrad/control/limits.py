"""The limits within which the batch size may change."""

import math
from dataclasses import dataclass


@dataclass
class Limits:
    """Limits on changes of the batch size, and how far the next change is away.

    Args:
        max_batch_size: largest size [samples].
        max_growth: largest factor at a time.
        patience: the rule has to ask for more so many times in a row.
        multiple: sizes are rounded up to a multiple of it; the largest size stands above this.
        may_shrink: smaller sizes are taken, too.
        min_batch_size: smallest size that it shrinks to [samples]; of one there is no variance.
    """

    max_batch_size: int | None = None
    max_growth: float = math.inf
    patience: int = 1
    multiple: int = 1
    may_shrink: bool = False
    min_batch_size: int = 2
    asked: int = 0  # times in a row that the rule has asked for another size

    def __call__(self, batch_size: int, wanted: int, could_ask: bool = True) -> int:
        """The size of the next batch.

        Args:
            batch_size: of the present one.
            wanted: by the rule.
            could_ask: False where the rule needed a measurement that this step did not have: it does not count for
                `patience`.
        """
        if could_ask:
            self.asked = self.asked + 1 if wanted != batch_size else 0
        if wanted == batch_size or self.asked < self.patience:
            return batch_size
        size = self._bounded(batch_size, wanted)
        if size != batch_size:
            self.asked = 0
        return size

    def _bounded(self, batch_size: int, wanted: int) -> int:
        size = -(-wanted // self.multiple) * self.multiple
        if size > batch_size * self.max_growth:  # the largest multiple below; where there is none, the batch stays
            size = int(batch_size * self.max_growth) // self.multiple * self.multiple
        if self.max_batch_size is not None:
            size = min(size, self.max_batch_size)
        if wanted > batch_size:
            return max(size, batch_size)
        return max(min(size, batch_size), self.min_batch_size) if self.may_shrink else batch_size

    def state_dict(self) -> dict:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict) -> None:
        self.asked = state["asked"]
