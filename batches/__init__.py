"""Which samples make the next batch: how it is cut, and the stream that gives its micro-batches.

`InMemoryStream` and `LoadedStream` give the same micro-batches; both take up at any position.
"""

from batches.augment import smaller
from batches.in_memory import Batch, InMemoryStream
from batches.loading import LoadedStream
from batches.plan import Plan, cut, quickest
from batches.streams import build

__all__ = [
    "Batch",
    "InMemoryStream",
    "LoadedStream",
    "Plan",
    "build",
    "cut",
    "quickest",
    "smaller",
]
