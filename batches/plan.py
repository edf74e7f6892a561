"""How a batch is cut: global batch → ranks × micro-batches. Arithmetic on integers; nothing knows of devices."""

from dataclasses import dataclass


def positions_of_rank(start: int, stop: int, rank: int, world_size: int) -> range:
    """The positions p in [start, stop) with p mod world_size = rank."""
    return range(start + (rank - start) % world_size, stop, world_size)


@dataclass(frozen=True)
class Plan:
    """One global batch: positions [start, start + batch_size) of the sample order, in `steps` micro-batches a rank.

    Ranks and micro-batches differ by at most one sample, and the batch is exactly as large as was asked.
    """

    start: int
    batch_size: int
    world_size: int
    steps: int
    min_micro_batch_size: int = 1

    def micro_batches(self, rank: int) -> list[range]:
        """The positions of each of this rank's micro-batches; none is too small (so a rank may have one step fewer)."""
        own = positions_of_rank(self.start, self.start + self.batch_size, rank, self.world_size)
        steps = self._steps_of(len(own))
        cuts = [len(own) * i // steps for i in range(steps + 1)]
        return [own[a:b] for a, b in zip(cuts, cuts[1:])]

    @property
    def micro_batch_size(self) -> int:
        """Samples in the largest micro-batch of any rank."""
        shares = (self.batch_size // self.world_size, _ceil_div(self.batch_size, self.world_size))
        return max(_ceil_div(share, self._steps_of(share)) for share in shares)

    def _steps_of(self, share: int) -> int:
        """Into how many micro-batches a rank cuts its share of so many samples."""
        return min(self.steps, max(1, share // self.min_micro_batch_size))


def cut(
    start: int,
    batch_size: int,
    world_size: int,
    max_micro_batch_size: int,
    min_steps: int = 1,
    min_micro_batch_size: int = 1,
) -> Plan:
    """Cut a global batch into as few micro-batches as `max_micro_batch_size` (per device) and `min_steps` allow.

    Where the batch is too small for `min_steps` micro-batches of at least `min_micro_batch_size` on every rank, there
    are fewer.

    Raises:
        ValueError: the batch is smaller than the number of ranks.
    """
    if batch_size < world_size:
        raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} ranks")
    largest_share = _ceil_div(batch_size, world_size)
    steps = max(min_steps, _ceil_div(largest_share, max_micro_batch_size))
    most = max(1, largest_share // min_micro_batch_size)
    return Plan(start, batch_size, world_size, min(steps, most), min_micro_batch_size)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
