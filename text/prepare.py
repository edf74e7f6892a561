"""Write text files as tokens for --dataset=tokens.

    python -m text.prepare book.txt more/*.txt --out_dir=data/books
    python -m text.prepare book.txt --out_dir=data/books --tokenizer=tokenizer.json

writes train.bin, val.bin (tokens one after the other, uint16, or uint32 where there are more than 65,536 of them) and
meta.json into OUT_DIR: bytes, or the tokens of a tokenizer of the `tokenizers` library (requirements-text.txt). Files
are taken in the order given, each ended by a zero byte (by `<|endoftext|>`, where the tokenizer has it); the last part
of the text is for validation. The files get their names when all of them are whole. Exit status: 0 done, 2 refused, 130
or 143 interrupted.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from options.errors import UsageError, in_one_line
from options.names import expanded
from text.windows import BYTES

BLOCK = 2**20
"""Bytes per read."""
END_OF_TEXT = "<|endoftext|>"


class Bytes:
    """Each byte is a token."""

    name, vocab_size, end = "bytes", BYTES, [0]

    def __call__(self, block: bytes) -> np.ndarray:
        return np.frombuffer(block, np.uint8)


class Tokenizer:
    """The tokens of a tokenizer of the `tokenizers` library.

    Raises:
        UsageError: the library is not installed, or the file is no tokenizer.
    """

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError:
            raise UsageError("--tokenizer needs the tokenizers library: pip install -r requirements-text.txt") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain exceptions
            raise UsageError(f"--tokenizer={path} cannot be read ({in_one_line(error)})") from None
        self.name, self.vocab_size = path.name, self.tokenizer.get_vocab_size()
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        self.end = [] if end is None else [end]

    def __call__(self, block: bytes) -> list[int]:
        return self.tokenizer.encode(block.decode("utf-8", errors="replace"), add_special_tokens=False).ids


def blocks(path: Path, whole_lines: bool) -> Iterator[bytes]:
    """The file in blocks of about `BLOCK` bytes; with `whole_lines`, blocks end at line ends."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block + (file.readline() if whole_lines and not block.endswith(b"\n") else b"")


def prepare(files: Sequence[Path], out_dir: Path, encode: Bytes | Tokenizer, val_share: float) -> dict[str, int]:
    """Write the files; returns the number of tokens of each split.

    Args:
        val_share: share of the bytes for validation, taken from the end.
    """
    total = sum(path.stat().st_size for path in files)
    boundary = total - round(total * val_share)
    dtype = np.uint16 if encode.vocab_size <= 2**16 else np.uint32
    written, done = {"train": 0, "val": 0}, 0
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=out_dir) as folder:
        temporary = Path(folder)
        outputs = {split: open(temporary / f"{split}.bin", "wb") for split in written}  # noqa: SIM115

        def put(tokens: Sequence[int], split: str) -> None:
            outputs[split].write(np.asarray(tokens, dtype).tobytes())
            written[split] += len(tokens)

        with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            for path in files:
                for block in blocks(path, whole_lines=not isinstance(encode, Bytes)):
                    # Bytes can be cut anywhere, lines of a tokenizer's cannot.
                    cut = max(boundary - done, 0) if isinstance(encode, Bytes) or done >= boundary else len(block)
                    for split, part in (("train", block[:cut]), ("val", block[cut:])):
                        if part:
                            put(encode(part), split)
                    done += len(block)
                    bar.update(len(block))
                put(encode.end, "val" if done > boundary else "train")
        for file in outputs.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        meta = {"vocab_size": encode.vocab_size, "dtype": np.dtype(dtype).name, "tokenizer": encode.name}
        (temporary / "meta.json").write_text(json.dumps(meta) + "\n")
        for name in ("train.bin", "val.bin", "meta.json"):
            os.replace(temporary / name, out_dir / name)
    return written


def refuse(files: Sequence[Path], out_dir: Path, val_share: float) -> None:
    """
    Raises:
        UsageError: a file cannot be read, there is nothing in them, or OUT_DIR has tokens already.
    """
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path} is no file: give text files")
    if not any(path.stat().st_size for path in files):
        raise UsageError("the files are empty: give text files")
    if not 0 < val_share < 1:
        raise UsageError(f"--val_share={val_share} must be between 0 and 1, such as 0.05")
    present = [name for name in ("train.bin", "val.bin", "meta.json") if (out_dir / name).exists()]
    if present:
        raise UsageError(f"--out_dir={out_dir} has {present[0]} already: choose another folder, or remove it")


def terminated(number: int, frame) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments (default: `sys.argv`); returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m text.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="text files")
    parser.add_argument("--out_dir", type=Path, required=True, help="folder that takes the tokens")
    parser.add_argument("--tokenizer", type=Path, help="file of a tokenizer, tokenizer.json; default: bytes")
    parser.add_argument("--val_share", type=float, default=0.05, help="share for validation (default: %(default)s)")
    options = parser.parse_args(arguments)
    before: Callable | int | None = signal.signal(signal.SIGTERM, terminated)
    try:
        files, out_dir = [expanded("files", path) for path in options.files], expanded("out_dir", options.out_dir)
        refuse(files, out_dir, options.val_share)
        encode = Tokenizer(expanded("tokenizer", options.tokenizer)) if options.tokenizer else Bytes()
        out_dir.mkdir(parents=True, exist_ok=True)
        written = prepare(files, out_dir, encode, options.val_share)
    except UsageError as error:
        print(f"text.prepare: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"text.prepare: error: {in_one_line(error)}: nothing is left half-written", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{out_dir}: {written['train']:,} tokens for training, {written['val']:,} for validation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
