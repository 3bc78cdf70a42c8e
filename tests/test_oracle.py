"""Every variant, position encoding and setting against the float64 oracle, in every way it can be run."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from cases import CASES, random_attention, weights_of
from multimatrix.attention import VARIANTS, make_spec
from multimatrix.attention.module import Attention, RotaryTables
from multimatrix.ops.reference import attend_circuits, reference_attention

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
TOKENS = 7

every_case = pytest.mark.parametrize("spec", CASES.values(), ids=CASES.keys())


def test_every_variant_is_covered():
    assert {spec.variant for spec in CASES.values()} == set(VARIANTS)


@every_case
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_forward_and_every_gradient(spec, backend):
    module = random_attention(spec)
    x = torch.randn(2, TOKENS, spec.hidden_size, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    inputs = [x, *module.parameters()]
    weights = weights_of(module)

    expected = torch.stack([reference_attention(spec, weights, sequence) for sequence in x])
    actual = module(x, backend=backend)

    torch.testing.assert_close(actual, expected, **TIGHT)
    expected_gradients = torch.autograd.grad((expected * direction).sum(), inputs)
    actual_gradients = torch.autograd.grad((actual * direction).sum(), inputs)
    for actual_gradient, expected_gradient in zip(actual_gradients, expected_gradients, strict=True):
        assert expected_gradient.abs().max() > 1e-6
        torch.testing.assert_close(actual_gradient, expected_gradient, **TIGHT)


@every_case
@pytest.mark.parametrize("chunks", [[1] * TOKENS, [3, 1, 3], [1, 6]], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_decoding_and_chunked_prefill(spec, chunks, backend):
    module = random_attention(spec)
    x = torch.randn(2, TOKENS, spec.hidden_size, dtype=torch.float64)
    weights = weights_of(module)
    cache = DynamicCache()
    with torch.no_grad():
        expected = torch.stack([reference_attention(spec, weights, sequence) for sequence in x])
        pieces = [module(chunk, cache=cache, backend=backend) for chunk in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **TIGHT)


@every_case
def test_causality(spec):
    module = random_attention(spec)
    x = torch.randn(1, TOKENS, spec.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        before = module(x)
        for t in range(1, TOKENS):
            future = x.clone()
            future[:, t:] += torch.randn_like(future[:, t:])
            after = module(future)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.allclose(after[:, t:], before[:, t:])


@every_case
def test_only_relative_positions_matter(spec):
    module = random_attention(spec)
    x = torch.randn(1, TOKENS, spec.hidden_size, dtype=torch.float64)
    at_start, far_away = (
        module(x, rotary=RotaryTables(torch.arange(start, start + TOKENS), x.dtype)) for start in (0, 1000)
    )
    torch.testing.assert_close(far_away, at_start, **TIGHT)


def test_the_third_reading_of_key_reuse_depends_on_absolute_position():
    """The value from the rotated key, the output not rotated back."""
    spec = make_spec(32, VARIANTS["mfa_kr"].sized(32, 8).to_dict() | {"key_reuse": "relative"})
    weights = {name: value.detach() for name, value in weights_of(random_attention(spec)).items()}
    x = torch.randn(TOKENS, 32, dtype=torch.float64)
    leaking = dataclasses.replace(spec.circuits(weights, x), value_rotation="absolute")
    at_start, far_away = (attend_circuits(leaking, scale=spec.scale, offset=offset) for offset in (0, 1000))
    assert (at_start - far_away).abs().max() > 0.1


def test_the_readings_of_key_reuse_differ_only_where_rope_turns():
    x = torch.randn(1, TOKENS, 32, dtype=torch.float64)
    for settings, same in (({}, False), ({"position": "none"}, True), ({"position": "alibi"}, True)):
        outputs = []
        for key_reuse in ("unrotated", "relative"):
            sizes = VARIANTS["mfa_kr"].sized(32, 8).to_dict() | settings | {"key_reuse": key_reuse}
            torch.manual_seed(1)
            outputs.append(random_attention(make_spec(32, sizes))(x))
        assert torch.allclose(*outputs) == same


def test_value_equals_key_at_initialization():
    spec = VARIANTS["mfa_kr"].sized(32, 8)
    module = Attention(spec).double()
    tied = Attention(make_spec(32, spec.to_dict() | {"value_map": "tied"})).double()
    tied.load_state_dict(module.state_dict(), strict=False)
    x = torch.randn(1, TOKENS, 32, dtype=torch.float64)
    torch.testing.assert_close(module(x), tied(x), **TIGHT)
