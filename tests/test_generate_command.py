"""`multimatrix generate` and its decoder: the tokens of `generate`, streamed, and what reading them took."""

import re

import pytest
import torch

from cases import MODELS, random_ids, random_model
from command import multimatrix
from multimatrix.data import load_tokenizer
from multimatrix.generate.decoder import Decoder
from multimatrix.plan.numbers import kv_bytes_per_token

every_model = pytest.mark.parametrize("specs", MODELS.values(), ids=MODELS.keys())


@every_model
def test_greedy_tokens_are_those_of_transformers(specs):
    model = random_model(specs)
    for length in (7, 1):
        ids = random_ids(1, length)
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, length:].tolist()
        decoder = Decoder(model)
        assert list(decoder.stream(ids, 6)) == expected
        stop = frozenset(expected[2:3])
        assert list(decoder.stream(ids, 6, stop)) == expected[: expected.index(expected[2]) + 1]
        assert list(decoder.stream(ids, 1)) == expected[:1]


def test_samples_follow_the_distribution():
    model = random_model(MODELS["mfa"])
    ids = random_ids(1, 4)
    p = (model(ids).logits[0, -1].double() / 3).softmax(-1)
    torch.manual_seed(0)
    first = torch.tensor([next(Decoder(model, temperature=3.0).stream(ids, 1)) for _ in range(2000)])
    counts = torch.bincount(first, minlength=61) / 2000
    assert (counts - p).abs().max() < 5 * (0.25 / 2000) ** 0.5
    ordered, index = p.sort(descending=True)
    likely = set(index[: int((ordered.cumsum(-1) < 0.5).sum()) + 1].tolist())
    some = {next(Decoder(model, temperature=3.0, top_p=0.5).stream(ids, 1)) for _ in range(300)}
    assert some <= likely
    assert len(some) > 1
    assert next(Decoder(model, temperature=3.0, top_p=1e-9).stream(ids, 1)) == int(p.argmax())


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_that_a_token_needs(tied):
    specs = MODELS["mfa_kr"]
    model = random_model(specs, torch.float32, tie_word_embeddings=tied)
    decoder = Decoder(model)
    list(decoder.stream(random_ids(1, 5), 4))
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name) * 4
    weights += 61 * 32 * 4 if tied else 32 * 4
    cache = kv_bytes_per_token(specs, bits=32)
    assert decoder.speed.tokens == 3
    assert decoder.speed.bytes_read == 3 * weights + cache * (6 + 7 + 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = load_tokenizer("bytes", [])
    torch.manual_seed(0)
    model = random_model(MODELS["mfa_kr"], torch.float32, vocab_size=len(tokenizer))
    path = tmp_path_factory.mktemp("generate") / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, model, tokenizer


def test_command_streams_the_text_and_says_how_fast(folder):
    path, model, tokenizer = folder
    done = multimatrix("generate", path, "--prompt", "hello", "--max-new-tokens", 9)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert done.status == 0
    assert done.out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    assert "9 tokens, " in done.err
    assert "tokens/s" in done.err
    assert "GB/s" in done.err
    runs = [
        multimatrix("generate", path, "--prompt", "a", "--max-new-tokens", 9, "--temperature", 1, "--seed", seed).out
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", ""], "the prompt has no tokens"),
        (["--prompt", "hello", "--max-new-tokens", 60], "5 tokens of the prompt and 60 new ones .* at most 59"),
        (["--prompt", "a", "--attention", "fast"], "auto, triton, sdpa, eager; got 'fast'"),
        (["--prompt", "a", "--attention", "triton", "--max-new-tokens", 9], "it runs on a GPU; choose another"),
        (["--prompt", "a", "--top-p", 0], "--top-p must be above 0"),
        (["--prompt", "a", "--device", "cuda:7"], "device 'cuda:7' cannot be used"),
    ],
)
def test_bad_input(folder, words, sentence):
    assert re.search(sentence, multimatrix("generate", folder[0], *words).sentence)


def test_a_folder_without_a_model(tmp_path):
    assert "no" in multimatrix("generate", tmp_path / "none", "--prompt", "a").sentence
