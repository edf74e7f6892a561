"""How a batch is cut: global batch → ranks × micro-batches. Arithmetic on integers; nothing knows of devices."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from adadagrad.order import positions


@dataclass(frozen=True)
class Plan:
    """One global batch: positions [start, start + batch_size) of the sample order, in micro-batches.

    Ranks' shares differ by at most one sample, and the batch is exactly as large as was asked. A share is cut into
    micro-batches of `size` and one remainder, or into `steps` micro-batches that differ by at most one sample.
    """

    start: int
    batch_size: int
    world_size: int
    steps: int
    min_micro_batch_size: int = 1
    size: int | None = None

    def micro_batches(self, rank: int) -> list[range]:
        """The positions of each of this rank's micro-batches; none is too small (so a rank may have one step fewer)."""
        own = positions(self.start, self.batch_size, rank, self.world_size)
        cuts = _cuts(len(own), self.steps, self.min_micro_batch_size, self.size)
        return [own[a:b] for a, b in zip(cuts, cuts[1:])]

    @property
    def micro_batch_size(self) -> int:
        """Samples in the largest micro-batch of any rank."""
        return _largest(self.batch_size, self.world_size, self.steps, self.min_micro_batch_size, self.size)


@lru_cache(maxsize=8)  # most batches are cut as the one before
def _largest(batch_size: int, world_size: int, *how: int | None) -> int:
    cuts = [_cuts(share, *how) for share in (batch_size // world_size, _ceil_div(batch_size, world_size))]
    return max(b - a for own in cuts for a, b in zip(own, own[1:]))


@lru_cache(maxsize=8)
def _cuts(share: int, steps: int, min_micro_batch_size: int, size: int | None) -> list[int]:
    """Where a rank cuts its share of so many samples: 0, …, share."""
    if size:
        # torch.compile specialises on size 1, so a sample moves here from the micro-batch before.
        alone = share % size == 1 and share > size > 2
        whole = [*range(0, share, size), share]
        return [*whole[:-2], whole[-2] - alone, share]
    steps = min(steps, max(1, share // min_micro_batch_size))
    return [share * i // steps for i in range(steps + 1)]


def cut(
    start: int,
    batch_size: int,
    world_size: int,
    max_micro_batch_size: int,
    min_steps: int = 1,
    min_micro_batch_size: int = 1,
    even: bool = False,
) -> Plan:
    """Cut a global batch into as few micro-batches as `max_micro_batch_size` (per device) and `min_steps` allow.

    Where the maximum decides, into micro-batches of just that size and a remainder: a size that is new costs a GPU new
    plans, new memory and, compiled, a compilation. Where the batch is too small for `min_steps` micro-batches of at
    least `min_micro_batch_size` on every rank, there are fewer.

    Args:
        even: equally large micro-batches, equally many on every rank (unless the maximum is 1): for layers that couple
            the samples of a micro-batch, or of all ranks' micro-batches. Statistics of a small remainder would be poor.

    Raises:
        ValueError: the batch is smaller than the number of ranks.
    """
    if batch_size < world_size:
        raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} ranks")
    smallest_share, largest_share = batch_size // world_size, _ceil_div(batch_size, world_size)
    needed = _ceil_div(largest_share, max_micro_batch_size)
    steps = max(needed, min(min_steps, max(1, smallest_share // min_micro_batch_size)))
    remainder = needed == steps > 1 and not even and min_micro_batch_size == 1
    size = max_micro_batch_size if remainder else None
    return Plan(start, batch_size, world_size, steps, min_micro_batch_size, size)


def quickest(rate: Callable[[int], float], smallest: int, largest: int) -> tuple[int, dict[int, float]]:
    """The smallest of the sizes `smallest`, twice that, … `largest` whose rate is within 5 % of the best.

    Ends where a size does not fit (its rate is 0), or where two doublings have brought nothing.

    Args:
        rate: of a size [samples/s].

    Returns:
        The size, 0 where none fits, and the rates by size.
    """
    rates: dict[int, float] = {}
    size = smallest
    while True:
        rates[size] = rate(size)
        before = max(list(rates.values())[:-2], default=0.0)
        idle = len(rates) > 2 and max(list(rates.values())[-2:]) < 1.05 * before
        if size == largest or not rates[size] or idle:
            break
        size = min(2 * size, largest)
    enough = 0.95 * max(rates.values())
    return min((size for size, found in rates.items() if found >= enough and found), default=0), rates


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
