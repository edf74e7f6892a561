"""Text: windows of tokens, the standard library, what prepares tokens, the GPT against the slow oracle, in a run."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import batches
import data
import main
from adadagrad import gradients
from checks import oracle
from checks.conftest import ROOT, column, train
from options.errors import RunError, UsageError
from text import prepare
from text.gpt import GPT, rotated
from text.windows import Windows, read_tokens, standard_library

SMALL = ["--model=gpt", "--model_args.layers=1", "--model_args.width=16", "--model_args.heads=2"]


def write_tokens(folder, train, val, **meta):
    for split, tokens in (("train", train), ("val", val)):
        np.asarray(tokens, meta.get("dtype", "uint16")).tofile(folder / f"{split}.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))


def test_windows_do_not_overlap_and_targets_follow_inputs():
    windows = Windows(np.arange(100, dtype=np.uint16), 9, 100)
    assert len(windows) == 10
    inputs, targets = windows.gather(torch.arange(10))
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (10, 9)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    whole = torch.cat([inputs, targets[:, -1:]], 1)
    assert whole.flatten().tolist() == list(range(100))
    assert all(torch.equal(a, b[3]) for a, b in zip(windows[3], (inputs, targets)))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_positions_of_tokens_are_those_of_any_data_set(tmp_path, dtype):
    """The stream of one rank, cut, is that of three; every window once an epoch; validation as well."""
    write_tokens(tmp_path, range(330), range(60), vocab_size=400, dtype=dtype)
    data_set = data.load("tokens", tmp_path, sequence_length=9)
    stream = batches.build(data_set, 5, True, torch.device("cpu"), torch.float32)
    whole, _ = stream.read(range(40, 73))  # across the border of two epochs of 33
    starts = whole[:, 0].tolist()
    epoch = stream.read(range(33))[0][:, 0].tolist()
    assert sorted(epoch) == list(range(0, 330, 10)) != epoch
    for rank in range(3):
        own = range(40 + rank, 73, 3)
        parts = [inputs[:, 0] for inputs, _ in stream.take([own[:4], own[4:]])]
        assert torch.cat(parts).tolist() == starts[rank::3]
    seen = [x for rank in range(2) for inputs, _ in stream.validation(rank, 2, 2) for x in inputs[:, 0].tolist()]
    assert sorted(seen) == list(range(0, 60, 10))


def test_a_large_file_costs_no_memory(tmp_path):
    """A sparse file of 10⁹ tokens: mapped, not read."""
    for split in ("train", "val"):
        with open(tmp_path / f"{split}.bin", "wb") as file:
            file.truncate(2 * 10**9)
    code = (
        "import resource, sys; sys.path.insert(0, '.'); import torch, data, batches, pathlib\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        f"s = data.load('tokens', pathlib.Path({str(tmp_path)!r}), vocab_size=50257)\n"
        "stream = batches.build(s, 1, True, torch.device('cpu'), torch.float32)\n"
        "stream.read(range(100, 164)); print(peak() - before, len(s.train))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    memory, windows = map(float, done.stdout.split())
    assert windows == 10**9 // 257 and memory < 150  # MiB, of 1,900: a permutation of 3.9 million


@pytest.mark.parametrize(
    "case, words",
    [
        ("no files", "has no train.bin: make it by python -m text.prepare"),
        ("no meta", "--dataset_args.vocab_size=N is needed"),
        ("odd", "is no file of uint16 tokens"),
        ("short", "has no window of 257"),
        ("meta", "meta.json cannot be used"),
    ],
)
def test_token_files_refused(tmp_path, case, words):
    write_tokens(tmp_path, range(300), range(300), **({} if case == "no meta" else {"vocab_size": 300}))
    if case == "no files":
        (tmp_path / "train.bin").unlink()
    if case == "odd":
        (tmp_path / "train.bin").write_bytes(b"abc")
    if case == "short":
        write_tokens(tmp_path, range(300), range(20), vocab_size=300)
    if case == "meta":
        (tmp_path / "meta.json").write_text('{"vocab_size": "many"}')
    with pytest.raises(UsageError, match=words):
        data.load("tokens", tmp_path)


def test_tokens_outside_the_vocabulary_are_named(tmp_path):
    write_tokens(tmp_path, range(300), range(300), vocab_size=100)
    data_set = data.load("tokens", tmp_path, sequence_length=9)
    data_set.train.gather(torch.arange(9))
    with pytest.raises(RunError, match="--dataset_args.vocab_size=100: the text has token 109"):
        data_set.train.gather(torch.tensor([10]))
    assert data.load("tokens", tmp_path, sequence_length=9, vocab_size=300).num_outputs == 300


def test_the_home_folder_is_meant_as_a_shell_means_it(tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_bytes(b"word\n" * 300)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare.main(["~/words.txt", "--out_dir=~/tokens"]) == 0
    assert (tmp_path / "tokens" / "train.bin").exists()


@pytest.mark.long
def test_the_standard_library_is_the_same_text_every_time():
    first, second = standard_library(), standard_library()
    assert first.vocab_size == 256 and first.is_bytes and np.array_equal(first.val, second.val)
    assert len(first.train) > 5_000_000 and 0.01 < len(first.val) / len(first.train) < 0.15
    assert b"def " in first.val.tobytes()[:100_000]
    assert data.load("stdlib", pathlib.Path("nowhere")).defaults == {"max_samples": 8192, "validation_samples": 2048}


def test_prepared_bytes_are_the_files(tmp_path, capsys):
    texts = [b"one\n" * 300, "zwei \u00e4\n".encode() * 200]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text)
    files = [str(tmp_path / f"{i}.txt") for i in range(2)]
    assert prepare.main([*files, f"--out_dir={tmp_path / 'out'}", "--val_share=0.25"]) == 0
    text = read_tokens(tmp_path / "out")
    assert text.is_bytes and text.vocab_size == 256
    whole = np.concatenate([text.train, text.val]).astype(np.uint8).tobytes()
    assert whole == texts[0] + b"\0" + texts[1] + b"\0"
    assert len(text.val) == round(0.25 * sum(map(len, texts))) + 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert prepare.main([*files, f"--out_dir={tmp_path / 'out'}"]) == 2
    assert "has train.bin already" in capsys.readouterr().err


def test_prepared_by_a_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    text = "a line of words, and another\n" * 200
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(text)
    words = [str(tmp_path / "text.txt"), f"--out_dir={tmp_path}", f"--tokenizer={tmp_path / 'tokenizer.json'}"]
    assert prepare.main(words) == 0
    ids = (
        np.fromfile(tmp_path / "train.bin", np.uint16).tolist() + np.fromfile(tmp_path / "val.bin", np.uint16).tolist()
    )
    assert ids[-1] == tokenizer.token_to_id("<|endoftext|>") and tokenizer.decode(ids[:-1]) == text
    assert json.loads((tmp_path / "meta.json").read_text())["vocab_size"] == tokenizer.get_vocab_size()


def test_interrupted_preparation_leaves_nothing(tmp_path):
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(30 * 2**30)  # sparse
    command = [sys.executable, "-m", "text.prepare", str(tmp_path / "large.txt"), f"--out_dir={tmp_path / 'out'}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    for _ in range(600):
        if list((tmp_path / "out").glob(".prepare-*/train.bin")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and not os.listdir(tmp_path / "out")


def test_rotary_positions_depend_on_distances_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    repeated = [rotated(v.expand(1, 1, 12, 8)) for v in (q, k)]
    products = (repeated[0] @ repeated[1].mT)[0, 0]
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert (products[0, 0] - products[0, 5]).abs() > 1e-3


GPTS = {
    "as it is": {},
    "tied": {"tied": True, "positions": "learned"},
    "all else": {"mlp": "swiglu", "positions": "learned", "bias": True},
}


@pytest.mark.parametrize("name", GPTS)
def test_statistics_of_a_gpt_equal_the_oracle(name):
    """A sequence is a sample: its gradient is that of the mean over its tokens."""
    torch.manual_seed(0)
    model = GPT((7,), 11, layers=2, heads=2, width=8, **GPTS[name]).double()
    for parameter in model.parameters():  # away from the small initial values, where branches hardly count
        torch.nn.init.normal_(parameter, std=0.4)
    tokens = torch.randint(11, (6, 8))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def loss(logits, targets):
        return data.next_token_loss(logits, targets).mean()

    expected = oracle.statistics(oracle.gradient_vectors(model, loss, inputs, targets))
    for test_gradients in ("ghost", "vmap"):
        moments = gradients.moments(model, loss, inputs, targets, test_gradients=test_gradients)
        for quantity, value in expected.items():
            assert getattr(moments, quantity) == pytest.approx(value, rel=1e-6), (test_gradients, quantity)
    _, told = gradients.build("auto", model, loss, True, 8, (inputs[:3], targets[:3]))
    assert not [line for line in told if "vmap" in line]  # ghost covers it


def test_a_gpt_does_not_look_ahead():
    torch.manual_seed(0)
    model, tokens = GPT((9,), 5, layers=2, width=8, heads=2), torch.randint(5, (1, 9))
    other = tokens.clone()
    other[0, 6:] = (other[0, 6:] + 1) % 5
    assert torch.equal(model(tokens)[0, :6], model(other)[0, :6]) and not torch.equal(model(tokens), model(other))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text of few words in any order, as bytes."""
    folder = tmp_path_factory.mktemp("words")
    choices = np.random.default_rng(0).choice(["alpha ", "beta ", "gamma "], 6000)
    (folder / "words.txt").write_text("".join(choices))
    assert prepare.main([str(folder / "words.txt"), f"--out_dir={folder}"]) == 0
    return folder


def test_a_gpt_learns_and_is_judged_by_bits_a_byte(words, tmp_path):
    options = [
        "--dataset=tokens",
        f"--data_dir={words}",
        "--dataset_args.sequence_length=32",
        *SMALL,
        "--learning_rate=0.01",
    ]
    options += ["--test_type=norm", "--max_samples=2000", "--max_batch_size=64", "--devices=1", "--accelerator=cpu"]
    assert main.main([*options, f"--out_dir={tmp_path}", "--run_name=run"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["objective"] == "val_bits_per_byte" and not summary["larger_is_better"]
    assert summary["val_bits_per_byte"] == pytest.approx(summary["val_loss"] / math.log(2))
    assert summary["val_perplexity"] == pytest.approx(math.exp(summary["val_loss"]))
    assert (
        summary["val_bits_per_byte"] < 1.5
    )  # log2(3) bits a word of 5.7 bytes would be 0.28; 4 know the letters alone


def test_the_cut_of_a_batch_of_text_does_not_matter(words, tmp_path):
    options = [
        "--dataset=tokens",
        f"--data_dir={words}",
        "--dataset_args.sequence_length=16",
        *SMALL,
        "--precision=64-true",
    ]
    options += ["--test_type=norm", "--eta=0.1", "--max_samples=200", "--batch_size=8"]
    whole = train(tmp_path, *options, name="whole")
    cut = train(tmp_path, *options, "--max_micro_batch_size=3", processes=2, name="cut")
    assert column(whole, "batch_size") == column(cut, "batch_size") and column(whole, "batch_size")[-1] > 8
    assert column(whole, "train_loss") == pytest.approx(column(cut, "train_loss"), rel=1e-9)
    assert column(whole, "variance") == pytest.approx(column(cut, "variance"), rel=1e-7)


def tiny_llama(input_shape, num_outputs, layers=1):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=num_outputs, num_hidden_layers=layers, use_cache=False, **size)
    return LlamaForCausalLM(config)


def test_a_causal_model_of_transformers(words, tmp_path):
    pytest.importorskip("transformers")
    options = ["--dataset=tokens", f"--data_dir={words}", "--dataset_args.sequence_length=16", "--test_type=norm"]
    options += ["--model=checks.test_text:tiny_llama", "--model_args.layers=2", "--max_samples=64"]
    options += ["--devices=1", "--accelerator=cpu"]
    assert main.main([*options, f"--out_dir={tmp_path}", "--run_name=run"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["val_bits_per_byte"] < 8.5


def test_the_loss_of_a_sequence_is_the_mean_over_its_tokens():
    logits, targets = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    expected = torch.stack([cross_entropy(a, b) for a, b in zip(logits, targets)])
    torch.testing.assert_close(data.next_token_loss(logits, targets), expected)
