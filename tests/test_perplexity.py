"""Perplexity against token-by-token computations, and the command around it."""

from __future__ import annotations

import json
import lzma
import math

import numpy as np
import pytest
import torch

from cases import DECODERS, random_ids, random_model
from command import multimatrix
from damage import change_config
from multimatrix.data import load_tokenizer
from multimatrix.errors import InputError
from multimatrix.evaluate.perplexity import cut, loss_by_position, perplexity, token_losses, windows

BYTES = {"vocab_size": 257}  # what the bytes tokenizer needs
END = 256  # its bos and eos


@torch.no_grad()
def slow_losses(model, ids: list[int], context: int, stride: int) -> list[float]:
    """Nats of each token but the first: one call a token, on exactly the tokens that its window shows before it."""
    losses = []
    for target in range(1, len(ids)):
        moves = max(0, math.ceil((target - context) / stride))
        seen = torch.tensor([ids[moves * stride : target]])
        assert 1 <= seen.shape[1] <= context
        losses.append(-model(seen).logits[0, -1].double().log_softmax(-1)[ids[target]].item())
    return losses


@pytest.mark.parametrize(("context", "stride"), [(8, 1), (8, 3), (8, 8), (5, 2), (64, 32)])
@pytest.mark.parametrize("name", ["mha", "mla", "mfa", "mfa_kr", "mfa_kr-relative", "mfa-alibi", "hybrid-all"])
def test_against_one_token_at_a_time(name: str, context: int, stride: int) -> None:
    model = random_model(DECODERS[name])
    documents = [random_ids(length).tolist() for length in (23, 2, 9, 1, 10)]
    found = token_losses(model, [np.array(d) for d in documents], context=context, stride=stride, batch_size=3)
    for ids, losses in zip(documents, found, strict=True):
        assert losses == pytest.approx(slow_losses(model, ids, context, stride), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", DECODERS)
def test_batch_size_and_other_documents_change_nothing(name: str) -> None:
    model = random_model(DECODERS[name])
    documents = [random_ids(length).numpy() for length in (3, 31, 12, 31, 8)]
    alone = [token_losses(model, [ids], context=10, stride=4, batch_size=1)[0] for ids in documents]
    for batch_size in (2, 64):
        together = token_losses(model, documents, context=10, stride=4, batch_size=batch_size)
        assert np.concatenate(together) == pytest.approx(np.concatenate(alone), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("stride", [1, 40])
def test_a_short_document_is_scored_in_full_context(stride: int) -> None:
    model = random_model(DECODERS["mfa"])
    ids = random_ids(40)
    losses = token_losses(model, [ids.numpy()], context=40, stride=stride, batch_size=8)[0]
    expected = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    assert losses == pytest.approx(expected.detach().numpy(), rel=1e-9)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 50])
@pytest.mark.parametrize(("context", "stride"), [(8, 1), (8, 5), (8, 8), (2, 1)])
def test_windows_score_each_token_once_with_enough_context(length: int, context: int, stride: int) -> None:
    scored = []
    for begin, first, end in windows(length, context, stride):
        assert end - begin <= context
        scored += range(first, end)
        if begin:
            assert first - begin + 1 >= context - stride + 1
    assert scored == list(range(length))


def test_a_uniform_model_needs_log2_of_the_vocabulary() -> None:
    model = random_model(DECODERS["mfa_kr"], **BYTES)
    torch.nn.init.zeros_(model.lm_head.weight)
    tokenizer = load_tokenizer("bytes", [])
    documents = ["naïve 👍", "two <|endoftext|> three"]
    score = perplexity(model, tokenizer, documents, context=8, stride=4)
    size = len("".join(documents).encode())
    assert (score.documents, score.tokens, score.bytes) == (2, size, size)
    assert score.bits_per_byte == pytest.approx(math.log2(257) * score.tokens / score.bytes, rel=1e-12)
    assert score.nats_per_token == pytest.approx(math.log(257), rel=1e-12)
    assert score.perplexity == pytest.approx(257, rel=1e-12)


def test_sums_of_real_documents() -> None:
    """Tokens of several bytes: nats, bits and bytes by hand; the first token follows the bos."""
    documents = ["the cat sat on the mat", "the hat 👍"]
    tokenizer = load_tokenizer("bpe:262", ["the cat sat on the mat"] * 20)
    model = random_model(DECODERS["gqa"], vocab_size=262)
    ids = [[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in documents]
    losses = [slow_losses(model, row, 6, 2) for row in ids]
    score = perplexity(model, tokenizer, documents, context=6, stride=2)
    tokens = sum(map(len, ids)) - 2
    assert score.tokens == tokens < score.bytes == sum(len(text.encode()) for text in documents)
    assert score.nats_per_token == pytest.approx(sum(map(sum, losses)) / tokens, rel=1e-9)
    assert score.bits_per_byte == pytest.approx(sum(map(sum, losses)) / math.log(2) / score.bytes, rel=1e-9)
    assert score.by_position[0].nats_per_token == pytest.approx((losses[0][0] + losses[1][0]) / 2, rel=1e-9)
    assert sum(bucket.tokens for bucket in score.by_position) == tokens
    assert score.prefix == "<|endoftext|>"


def test_loss_by_position() -> None:
    buckets = list(loss_by_position([np.array([1.0, 2, 3, 4, 5, 6]), np.array([3.0, 4, 5])]))
    assert [(b.first, b.last, b.tokens, b.nats_per_token) for b in buckets] == [
        (0, 0, 2, 2.0),
        (1, 1, 2, 3.0),
        (2, 3, 3, 4.0),
        (4, 5, 2, 5.5),
    ]


def test_cut_keeps_characters_whole() -> None:
    assert cut(["abc", "dé", "f"], 5) == ["abc", "d"]
    assert cut(["abc", "dé", "f"], 6) == ["abc", "dé"]
    assert cut(["abc", "dé", "f"], 99) == ["abc", "dé", "f"]


def test_a_tokenizer_that_marks_no_document_is_refused() -> None:
    tokenizer = load_tokenizer("bytes", [])
    tokenizer.bos_token = None
    model = random_model(DECODERS["mha"], **BYTES)
    assert perplexity(model, tokenizer, ["a"], context=4, stride=2).prefix == "<|endoftext|>"  # then it is eos
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither a bos nor an eos"):
        perplexity(model, tokenizer, ["a"], context=4, stride=2)


def test_a_model_of_nan_is_refused() -> None:
    model = random_model(DECODERS["mha"], **BYTES)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(InputError, match="not finite at 3 of 3 tokens"):
        perplexity(model, load_tokenizer("bytes", []), ["abc"], context=4, stride=2)


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    random_model(DECODERS["mfa_kr"], torch.float32, **BYTES).save_pretrained(path)
    load_tokenizer("bytes", []).save_pretrained(path)
    return path


def test_command(folder, tmp_path) -> None:
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"the fox\n" * 20))
    (tmp_path / "b.jsonl").write_text('{"text": "naïve"}\n{"text": " "}\n{"text": "hen"}\n')
    words = ("evaluate", folder, "--perplexity", tmp_path / "a.txt.xz", tmp_path / "b.jsonl")
    done = multimatrix(*words, "--json", "--out", tmp_path / "out" / "p.json", "--batch-size", 3)
    assert done.status == 0, done.err
    results = json.loads(done.out)
    assert results == json.loads((tmp_path / "out" / "p.json").read_text())
    score = results["perplexity"]
    assert (score["documents"], score["bytes"], score["context"], score["stride"]) == (3, 169, 64, 32)
    assert results["model"]["attention"]["variant"] == "mfa_kr"
    assert results["environment"]["torch"] == torch.__version__

    table = multimatrix(*words).out
    for text in (f"{score['bits_per_byte']:.4f}", "a.txt.xz and 1 more", "window 64, stride 32", "128 to 159"):
        assert text in table
    shorter = json.loads(multimatrix(*words, "--json", "--max-bytes", 8, "--context", 16, "--stride", 3).out)
    assert (shorter["perplexity"]["bytes"], shorter["perplexity"]["stride"]) == (8, 3)
    beyond = multimatrix(*words, "--context", 70)
    assert "beyond the model's 64 positions" in beyond.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "give --tasks, --perplexity or both"),
        (("--perplexity", "TEXT", "--stride", 65), "stride must be at least 1 and at most the context of 64 tokens"),
        (("--perplexity", "TEXT", "--context", 1), "at least 2 tokens, got 1"),
        (("--perplexity", "TEXT", "--dtype", "int8"), "dtype must be one of"),
        (("--perplexity", "TEXT", "--device", "warp"), "device 'warp' cannot be used"),
        (("--perplexity", "TEXT", "--limit", 3), "--limit has no effect without --tasks"),
        (("--perplexity", "TEXT", "--out", "FOLDER"), "is a folder; name a file, for example"),
        (("--perplexity", "TEXT", "--out", "TEXT/deep/p.json"), "no file can be written at"),
        (("--perplexity", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--stride", 3, "--tasks", "piqa"), "--stride has no effect without --perplexity"),
        (("TEXT", "--tasks", "piqa"), "files has no effect without --perplexity"),
    ],
)
def test_bad_input(folder, tmp_path, words, sentence) -> None:
    (tmp_path / "text.txt").write_text("some text")
    places = {"TEXT": tmp_path / "text.txt", "FOLDER": tmp_path, "TEXT/deep/p.json": tmp_path / "text.txt/deep/p.json"}
    done = multimatrix("evaluate", folder, *(places.get(word, word) for word in words))
    assert sentence in done.sentence


def test_folders_that_do_not_load(folder, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    score = ("--perplexity", tmp_path / "text.txt")
    assert "there is no folder" in multimatrix("evaluate", tmp_path / "none", *score).sentence
    assert "has no config.json" in multimatrix("evaluate", tmp_path, *score).sentence
    assert "give the folder of a saved model" in multimatrix("evaluate", *score).sentence

    bare = tmp_path / "bare"
    random_model(DECODERS["mha"], torch.float32, **BYTES).save_pretrained(bare)
    assert "holds no tokenizer" in multimatrix("evaluate", bare, *score).sentence

    small = tmp_path / "small"
    random_model(DECODERS["mha"], torch.float32, vocab_size=200).save_pretrained(small)
    load_tokenizer("bytes", []).save_pretrained(small)
    assert "ids up to 256 and the model embeds 200" in multimatrix("evaluate", small, *score).sentence

    change_config(small, hidden_size="wide")
    assert "'hidden_size' expected int" in multimatrix("evaluate", small, *score).sentence
    (small / "config.json").write_text("[]")
    assert "holds a JSON list" in multimatrix("evaluate", small, *score).sentence
    (small / "config.json").write_text('{"model_type": "nobody-knows"}')
    assert "cannot be loaded" in multimatrix("evaluate", small, *score).sentence


def test_a_model_that_is_not_ours(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32))
    model.save_pretrained(tmp_path / "llama")
    load_tokenizer("bytes", []).save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("some text of more than thirty-two tokens")
    done = multimatrix("evaluate", tmp_path / "llama", "--perplexity", tmp_path / "text.txt", "--json")
    score = json.loads(done.out)
    ids = [END, *load_tokenizer("bytes", []).encode((tmp_path / "text.txt").read_text())]
    assert score["model"]["model_type"] == "llama"
    expected = np.mean(slow_losses(model.eval(), ids, 32, 16))
    assert score["perplexity"]["nats_per_token"] == pytest.approx(expected, rel=1e-5)
