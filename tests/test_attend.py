"""The one entry to attention, beside the variants: masks, backends, precision."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from cases import DECODERS, random_model
from multimatrix.evaluate.cache_bytes import stored_bytes
from multimatrix.ops.alibi import alibi_slopes
from multimatrix.ops.attend import attend
from multimatrix.plan.numbers import kv_bytes_per_token


def tensors(tokens=4, slots=6, heads=6, groups=2):
    q = torch.randn(2, heads, tokens, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, groups, slots, 8, dtype=torch.float64)
    return q, (key, value)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
def test_backends_agree_and_an_empty_row_gives_zeros(tokens, alibi):
    q, latents = tensors(tokens)
    mask = torch.ones(2, 1, tokens, 6, dtype=torch.bool)
    mask[1, :, 0] = False
    slopes = alibi_slopes(6) if alibi else None
    both = [attend(q, latents, scale=0.3, mask=mask, slopes=slopes, backend=name) for name in ("sdpa", "eager")]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
    assert (both[0][1, :, 0] == 0).all()
    assert (both[0][0] != 0).all()


def test_without_a_mask_the_queries_are_the_last_tokens():
    q, (key, value) = tensors(tokens=3, slots=6)
    together = attend(q, (key, value), scale=0.3)
    for t in range(3):
        alone = attend(q[:, :, t : t + 1], (key[:, :, : 4 + t], value[:, :, : 4 + t]), scale=0.3)
        torch.testing.assert_close(together[:, :, t : t + 1], alone, rtol=1e-12, atol=1e-12)


def test_unknown_backend():
    with pytest.raises(ValueError, match="no attention backend 'fast'; choose auto, triton, eager, sdpa"):
        attend(*tensors(), scale=1.0, backend="fast")


@pytest.mark.parametrize("name", DECODERS)
def test_autocast_caches_what_is_stated(name):
    """Under bfloat16 autocast a float32 model stores 16-bit latents, in both caches."""
    model = random_model(DECODERS[name], torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (2, 6))
    stated = kv_bytes_per_token(model.config.layer_specs()) * ids.numel()
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=6)):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            first = model(ids[:, :5], cache=cache).logits
            last = model(ids[:, 5:], cache=cache).logits
        assert first.isfinite().all()
        assert last.isfinite().all()
        assert stored_bytes(cache) == stated


def test_hidden_states_on_request():
    model = random_model(next(iter(DECODERS.values())), torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (2, 5))
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert torch.equal(model.lm_head(states[-1]), model(ids).logits)
    assert model(ids).hidden_states is None
