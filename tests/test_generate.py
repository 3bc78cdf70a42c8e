"""`generate` with every variant: caches, batches and beams change the speed of an answer, never the answer."""

import pytest
import torch
from transformers import DynamicCache

from cases import DECODERS, padded, random_ids, random_model
from multimatrix.evaluate.cache_bytes import stored_bytes
from multimatrix.model.modeling import CACHE
from multimatrix.plan.numbers import kv_bytes_per_token

NEW = 6
# Lengths of the prompts of a batch: the longest, a short one, and a single token.
LENGTHS = (7, 3, 1)
every_decoder = pytest.mark.parametrize("specs", DECODERS.values(), ids=DECODERS.keys())


def generate(model, ids, mask=None, **options):
    """Greedy unless told otherwise; only the new tokens, [B, NEW]."""
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    return model.generate(ids, **settings | options)[:, ids.shape[1] :]


def greedy(model, ids):
    """Greedy continuation without `generate` or a cache."""
    for _ in range(NEW):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids[:, -NEW:]


@every_decoder
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}],
    ids=["dynamic", "static", "no-cache", "prompt-lookup"],
)
def test_greedy_with_every_cache(specs, options):
    model = random_model(specs)
    for length in LENGTHS:
        ids = random_ids(1, length)
        expected = greedy(model, ids)
        assert torch.equal(generate(model, ids, **options), expected)


@every_decoder
@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=["dynamic", "static", "no-cache"]
)
def test_left_padded_batch_generates_what_each_prompt_does_alone(specs, options):
    model = random_model(specs)
    rows = [random_ids(length) for length in LENGTHS]
    together = generate(model, *padded(rows), **options)
    assert torch.equal(together, torch.cat([greedy(model, row[None]) for row in rows]))
    assert together.unique().numel() > 2  # no constant answer


@every_decoder
def test_beams_with_and_without_cache(specs):
    model = random_model(specs)
    ids, mask = padded([random_ids(length) for length in LENGTHS])
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(model, ids, mask, use_cache=False, **beams)
    assert expected.shape == (6, NEW)
    assert torch.equal(generate(model, ids, mask, **beams), expected)
    assert torch.equal(generate(model, ids, mask, cache_implementation="static", **beams), expected)


@every_decoder
def test_sampling_is_reproducible(specs):
    model = random_model(specs)
    ids = random_ids(2, 5)
    samples = []
    for seed, use_cache in ((1, True), (1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        samples.append(generate(model, ids, do_sample=True, temperature=5.0, use_cache=use_cache))
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[0], samples[3])


@every_decoder
def test_a_second_turn_continues_the_cache_of_the_first(specs):
    model = random_model(specs)
    cache = DynamicCache(config=model.config)
    ids = random_ids(2, 5)
    answer = generate(model, ids, **{CACHE: cache})
    # The last token was never fed back.
    assert stored_bytes(cache) == 2 * (5 + NEW - 1) * kv_bytes_per_token(specs, bits=64)
    conversation = torch.cat((ids, answer, random_ids(2, 3)), dim=1)
    assert torch.equal(generate(model, conversation, **{CACHE: cache}), greedy(model, conversation))


@every_decoder
def test_embeddings_as_prompt(specs):
    model = random_model(specs)
    ids = random_ids(2, 5)
    embeddings = model.get_input_embeddings()(ids)
    tokens = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, greedy(model, ids))


@every_decoder
def test_rows_that_end_early_leave_the_others_alone(specs):
    model = random_model(specs)
    rows = [random_ids(length) for length in LENGTHS]
    free = generate(model, *padded(rows))
    end = free[0, 1].item()
    stopped = generate(model, *padded(rows), eos_token_id=end)
    for row, answer in zip(stopped, free, strict=True):
        stop = answer.tolist().index(end) + 1 if end in answer else NEW
        assert torch.equal(row[:stop], answer[:stop][: len(row)])
        assert (row[stop:] == 0).all()
