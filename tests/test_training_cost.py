"""FLOPs of a trained token by part, against the products that a model makes; utilization against a device's peak."""

import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cases import MODELS, random_ids, random_model
from multimatrix.errors import InputError
from multimatrix.plan.hardware import bf16_peak
from multimatrix.plan.training import flop_utilization, sizes_of, training_cost, training_flops_per_token

DENSE = [name for name in MODELS if "experts" not in name]


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_stated_training_flops_are_counted(name, skip_logits):
    specs, batch, context = MODELS[name], 2, 11
    # A vocabulary that the loss does not pad.
    model = random_model(
        specs, torch.float32, vocab_size=64, skip_logits=skip_logits, attn_implementation="eager"
    ).train()
    ids = random_ids(batch, context)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    # The eager products cover the masked half too, which is not counted.
    masked = sum(3 * spec.num_heads * sum(spec.head_dims) * (context - 1) for spec in specs)
    cost = training_cost(sizes_of(model.config), context)
    assert counter.get_total_flops() == (cost.flops + masked) * batch * context
    assert training_flops_per_token(model.config, context) == cost.flops == sum(cost.by_part().values())


def test_parts_by_hand():
    model = random_model(MODELS["mfa-experts"])
    cost = training_cost(sizes_of(model.config), 64)
    hidden, layers, (spec, _) = 32, 2, MODELS["mfa-experts"]
    assert cost.router == 6 * layers * 4 * hidden
    assert cost.feed_forward == 6 * layers * 3 * hidden * (2 * 16 + 8)  # two experts a token, and the shared one
    assert cost.output_head == 6 * 61 * hidden
    assert cost.attention_core == 3 * layers * spec.num_heads * 2 * spec.head_dim * 65
    assert cost.attention_linear == 6 * layers * spec.linear_products


def test_about_six_flops_per_parameter_and_token():
    model = random_model(MODELS["mha"], vocab_size=512)
    flops = training_flops_per_token(model.config, 1)
    products = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name and "embed" not in name)
    assert flops == pytest.approx(6 * products, rel=0.01)


def test_the_context_must_be_a_number():
    with pytest.raises(InputError, match="the context must be a whole number of at least 1, got 0"):
        training_cost(sizes_of(random_model(MODELS["mha"]).config), 0)


def test_utilization():
    assert bf16_peak("NVIDIA H100 80GB HBM3") == bf16_peak("NVIDIA H200") == 989e12
    assert bf16_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert flop_utilization(1e9, 494_500, "NVIDIA H200") == pytest.approx(0.5)
    assert flop_utilization(1e9, 494_500, "NVIDIA H200", devices=2) == pytest.approx(0.25)


def test_a_device_without_a_peak_has_no_utilization_and_that_is_said_once(caplog):
    bf16_peak.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [flop_utilization(1.0, 1.0, "Abacus") for _ in range(3)] == [None] * 3
    assert [record.message for record in caplog.records] == [
        "no model FLOP utilization: the peak of Abacus is not in recipes/hardware.toml"
    ]
