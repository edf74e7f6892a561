"""Tokens read as samples: `train.bin` and `val.bin` (memory-mapped), and the standard library's sources."""

import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from options.errors import RunError, UsageError

BYTES = 256
"""Vocabulary of byte-level text."""
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Text:
    """Training and validation tokens, unsigned (tokens,), in memory or memory-mapped; is_bytes: each is one byte."""

    train: np.ndarray
    val: np.ndarray
    vocab_size: int
    is_bytes: bool = False


class Windows(Dataset):
    """Sample i is tokens i(L+1) … i(L+1) + L of a text: the first L are the input, the last L the targets.

    Windows do not overlap, so that an epoch has every token at most once; an incomplete one at the end is not used.

    Args:
        tokens: unsigned (tokens,).
        sequence_length: L.
        vocab_size: tokens are 0 … vocab_size − 1.

    Raises:
        UsageError: the text is shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, vocab_size: int):
        self.tokens, self.width, self.vocab_size = tokens, sequence_length + 1, vocab_size
        if not len(self):
            raise UsageError(
                f"--dataset_args.sequence_length={sequence_length}: a text of {len(tokens):,} tokens has no window of "
                f"{self.width:,}: choose a shorter one"
            )

    def __len__(self) -> int:
        return len(self.tokens) // self.width

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.gather(torch.tensor([i]))
        return inputs[0], targets[0]

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these samples, int64 (n, L) each.

        Raises:
            RunError: a token is not in the vocabulary.
        """
        rows = np.empty((len(indices), self.width), dtype=np.int64)
        for row, i in zip(rows, indices.tolist()):
            row[:] = self.tokens[i * self.width : (i + 1) * self.width]
        if rows.max() >= self.vocab_size:
            raise RunError(
                f"--dataset_args.vocab_size={self.vocab_size}: the text has token {rows.max()}: give its real "
                "vocabulary's size"
            )
        windows = torch.from_numpy(rows)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def read_tokens(folder: Path, vocab_size: int | None = None) -> Text:
    """The text in `train.bin` and `val.bin`: tokens one after the other, uint16 or uint32, memory-mapped.

    Args:
        folder: may have `meta.json` with `vocab_size`, `dtype` ("uint16", "uint32") and `tokenizer` ("bytes", a name).
        vocab_size: overrides `meta.json`. Without a dtype there, tokens are uint16 for up to 65,536.

    Raises:
        UsageError: a file is missing or is none of tokens, or nobody says how large the vocabulary is.
    """
    meta = _read_meta(folder / "meta.json")
    vocab_size = vocab_size or meta.get("vocab_size")
    if vocab_size is None:
        raise UsageError(
            f"--dataset_args.vocab_size=N is needed: {folder} has no meta.json that says how many tokens there are"
        )
    dtype = np.dtype(meta.get("dtype") or ("uint16" if vocab_size <= 2**16 else "uint32"))
    train, val = (_mapped(folder / f"{split}.bin", dtype) for split in SPLITS)
    return Text(train, val, vocab_size, meta.get("tokenizer") == "bytes")


def _read_meta(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text())
        size, dtype = meta.get("vocab_size"), meta.get("dtype", "uint16")
        if not (size is None or (isinstance(size, int) and size > 0)) or dtype not in ("uint16", "uint32"):
            raise ValueError(f"vocab_size is {size}, dtype is {dtype}")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"--data_dir: {path} cannot be used ({error}): it needs vocab_size, a whole number, and dtype, uint16 or "
            "uint32"
        ) from None
    return meta


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.is_file():
        raise UsageError(
            f"--data_dir={path.parent} has no {path.name}: make it by python -m text.prepare FILES "
            f"--out_dir={path.parent}"
        )
    size = path.stat().st_size
    if not size or size % dtype.itemsize:
        raise UsageError(
            f"--data_dir: {path} has {size:,} bytes and is no file of {dtype} tokens: make it anew, or mend meta.json"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def standard_library(every: int = 20) -> Text:
    """The sources of the running Python's standard library as bytes, files separated by a zero byte.

    In a random order that depends on their names alone, every 20th file is for validation. All machines of a run need
    the same version of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path.relative_to(root)
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(path.parts)
    )
    random.Random(0).shuffle(paths)
    parts = {"train": bytearray(), "val": bytearray()}
    for i, path in enumerate(paths):
        parts["train" if i % every else "val"] += (root / path).read_bytes() + b"\0"
    return Text(*(np.frombuffer(bytes(parts[split]), np.uint8) for split in SPLITS), BYTES, is_bytes=True)
