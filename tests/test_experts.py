"""The mixture-of-experts feed-forward against its equations, and decoders that have one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, Trainer, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from cases import HYBRIDS, logits_in_chunks, padded, random_ids, random_model, randomized, small_config
from multimatrix import MultimatrixConfig, MultimatrixForCausalLM
from multimatrix.attention import make_spec
from multimatrix.errors import InputError
from multimatrix.evaluate import agreement
from multimatrix.model.experts import ExpertsSpec, make_experts
from multimatrix.model.mixture import MixtureOfExperts, load_balancing_loss, route
from multimatrix.ops import grouped
from multimatrix.plan.numbers import decoder_parameters, match_experts

H, TOKENS = 16, 9
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
SIZES = {"num_experts": 5, "experts_per_token": 2, "intermediate_size": 8}
SPECS = {
    "shared": SIZES | {"shared_intermediate_size": 12},
    "no-shared": SIZES,
    "not-normalized": SIZES | {"shared_intermediate_size": 12, "normalize_weights": False},
    "one-of-many": SIZES | {"num_experts": 40, "experts_per_token": 1},  # more experts than tokens
    "one-not-normalized": SIZES | {"experts_per_token": 1, "normalize_weights": False},
    "all": SIZES | {"experts_per_token": 5},
}
MOE = {"num_experts": 8, "experts_per_token": 2, "intermediate_size": 16, "shared_intermediate_size": 20}
MFA = make_spec(32, {"variant": "mfa", "num_heads": 4, "head_dim": 16, "query_rank": 16})
every_spec = pytest.mark.parametrize("sizes", SPECS.values(), ids=SPECS.keys())


def random_mixture(sizes: dict, dtype: torch.dtype = torch.float64) -> MixtureOfExperts:
    return randomized(MixtureOfExperts(make_experts(sizes), H).to(dtype), 0.4).train()


def swiglu(x, gate, up, down):
    """(silu(x W_gate) * x W_up) W_down of one token [H]."""
    hidden = gate @ x
    return down @ (hidden / (1 + torch.exp(-hidden)) * (up @ x))


def oracle(spec: ExpertsSpec, w: dict, x: torch.Tensor) -> torch.Tensor:
    """Token by token and expert by expert, as the equations have it; x [N, H]."""
    outputs = []
    for token in x:
        scores = torch.exp(w["router.weight"] @ token)
        p = scores / scores.sum()
        chosen = sorted(range(spec.num_experts), key=lambda e, p=p: -p[e].item())[: spec.experts_per_token]
        total = sum(p[e] for e in chosen) if spec.normalize_weights else 1.0
        y = torch.zeros_like(token)
        for e in chosen:
            matrices = (w[f"experts.{name}_proj"][e] for name in ("gate", "up", "down"))
            y = y + p[e] / total * swiglu(token, *matrices)
        if spec.shared_intermediate_size:
            y = y + swiglu(token, *(w[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")))
        outputs.append(y)
    return torch.stack(outputs)


def gradients(output, inputs):
    """Of a loss that weighs every element differently."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output).to(output)
    loss = (output.square() * weights).sum()
    return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


# ---- the module --------------------------------------------------------------------------------------------------


@every_spec
def test_forward_and_every_gradient_equal_the_oracle(sizes):
    module = random_mixture(sizes)
    weights = dict(module.named_parameters())
    x = torch.randn(2, TOKENS, H, dtype=torch.float64, requires_grad=True)
    y, router_logits = module(x)
    expected = oracle(module.spec, weights, x.flatten(0, 1)).view_as(x)
    assert_close(y, expected, **TIGHT)
    assert_close(router_logits, x.flatten(0, 1) @ weights["router.weight"].T, **TIGHT)
    inputs = {"x": x, **weights}
    actual, right = gradients(y, [*inputs.values()]), gradients(expected, [*inputs.values()])
    for name, ours, theirs in zip(inputs, actual, right, strict=True):
        assert_close(ours, theirs, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")
    choices = set(map(tuple, route(router_logits, module.spec)[1].sort().values.tolist()))
    assert len(choices) > 2 or sizes is SPECS["all"]  # tokens differ, or there is no mixture to see


@every_spec
def test_float32_grouped_products_equal_the_float64_loop(sizes, monkeypatch):
    exact = random_mixture(sizes)
    single = copy.deepcopy(exact).float()
    x = torch.randn(2, TOKENS, H, dtype=torch.float64)
    calls = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **words: calls.append(1) or grouped_mm(*args, **words))
    expected = exact(x)[0]
    assert not calls
    y = single(x.float())[0]
    assert len(calls) == 3
    assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    inputs = [*single.parameters()]
    right = gradients(expected, [*exact.parameters()])
    for ours, theirs in zip(gradients(y, inputs), right, strict=True):
        assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item() + 1e-4)


ROWS = [[3, 0, 4, 5], [0, 0, 12, 0], [12, 0, 0, 0], [0, 0, 0, 12], [1, 2, 3, 6]]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grouped_product_and_loop_agree(rows, dtype):
    """Also in which experts saw nothing: their gradient is zero, in memory that was poisoned with NaN."""
    ends = torch.tensor(rows).cumsum(0).int()
    x = torch.randn(12, 16, dtype=dtype, requires_grad=True)
    matrices = torch.randn(4, 24, 16, dtype=dtype, requires_grad=True)
    assert grouped.grouped_mm_serves(x, matrices)
    fast, slow = grouped.grouped_products(x, matrices, ends), grouped.products_one_by_one(x, matrices, ends)
    expert_of = [e for e, count in enumerate(rows) for _ in range(count)]
    plain = torch.stack([matrices[e] @ row for row, e in zip(x, expert_of, strict=True)])
    near = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 32 * torch.finfo(dtype).eps}
    assert_close(fast, plain, **near)
    assert_close(slow, plain, **near)
    for gradient, from_loop in zip(gradients(fast, [x, matrices]), gradients(slow, [x, matrices]), strict=True):
        assert_close(gradient, from_loop, rtol=near["rtol"], atol=from_loop.abs().max().item() * near["atol"])
    for gradient in (gradients(fast, matrices)[0], gradients(slow, matrices)[0]):
        unused = [e for e, count in enumerate(rows) if count == 0]
        assert (gradient[unused] == 0).all()
        assert gradient.isfinite().all()


def test_the_loop_is_differentiated_right():
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    matrices = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(grouped.products_one_by_one, (x, matrices, ends))


@pytest.mark.parametrize(
    ("dtype", "width", "serves"),
    [
        (torch.float32, 24, True),
        (torch.float32, 22, False),  # 88 bytes a row
        (torch.bfloat16, 24, True),
        (torch.bfloat16, 20, False),
        (torch.float64, 24, False),
    ],
    ids=str,
)
def test_what_grouped_mm_cannot_take_goes_to_the_loop(dtype, width, serves):
    x, matrices = torch.randn(6, 16, dtype=dtype), torch.randn(2, width, 16, dtype=dtype)
    ends = torch.tensor([4, 6], dtype=torch.int32)
    assert grouped.grouped_mm_serves(x, matrices) == serves
    expected = torch.cat([x[:4] @ matrices[0].T, x[4:] @ matrices[1].T])
    assert_close(grouped.grouped_products(x, matrices, ends), expected)


def test_a_gradient_without_strides_is_taken():
    """The gradient of a sum is one number that every element shares, which grouped_mm's backward refuses."""
    module = random_mixture(SPECS["no-shared"], torch.float32)
    module(torch.randn(2, TOKENS, H))[0].sum().backward()
    assert module.experts.down_proj.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_compiles_as_one_graph(dtype):
    module = random_mixture(SPECS["shared"], dtype)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters = [*module.parameters()]
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for stance in ("default", "fail_on_recompile"):  # other choices, the same graph
        x = torch.randn(2, TOKENS, H, dtype=dtype)
        with torch.compiler.set_stance(stance):
            y, expected = compiled(x)[0], module(x)[0]
        assert_close(y, expected)
        for ours, theirs in zip(gradients(y, parameters), gradients(expected, parameters), strict=True):
            assert_close(ours, theirs, **near)


def test_autocast_is_honoured_and_the_softmax_is_not_in_bfloat16():
    module = random_mixture(SPECS["shared"], torch.float32)
    x = torch.randn(2, TOKENS, H)
    expected = module(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, router_logits = module(x)
        weights, _ = route(router_logits, module.spec)
    assert y.dtype == router_logits.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    assert (y - expected).norm() / expected.norm() < 5e-2
    y.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


# ---- the balancing loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_balancing_loss_equals_that_of_transformers(masked, k):
    logits = tuple(torch.randn(2 * TOKENS, 7, requires_grad=True) for _ in range(3))
    mask = (torch.arange(TOKENS) >= torch.tensor([[0], [4]])).long() if masked else None
    actual = load_balancing_loss(logits, k, mask)
    expected = load_balancing_loss_func(logits, num_experts=7, top_k=k, attention_mask=mask)
    assert_close(actual, expected)
    for ours, theirs in zip(torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits), strict=True):
        assert_close(ours, theirs)
        assert ours.abs().max() > 0
        assert not masked or (ours.view(2, TOKENS, 7)[1, :4] == 0).all()


def test_balancing_loss_at_its_ends():
    """K where experts are equally busy and likely, E where one takes everything."""
    balanced = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert_close(load_balancing_loss([1e-9 * balanced], 1).item(), 1.0)
    assert_close(load_balancing_loss([1e3 * torch.eye(4, dtype=torch.float64)[:1].expand(6, 4)], 1).item(), 4.0)


def cross_entropy(logits, labels):
    log_p = logits[:, :-1].detach().float().log_softmax(-1)
    return -log_p.gather(-1, labels[:, 1:, None]).mean()


def test_the_loss_is_balanced_while_training_only():
    model = random_model([MFA] * 2, torch.float32, mixture_of_experts=MOE, router_aux_loss_coef=0.3)
    ids, mask = padded([random_ids(TOKENS), random_ids(5)])
    plain = model(ids, attention_mask=mask, labels=ids)
    assert_close(plain.loss, cross_entropy(plain.logits, ids))
    assert "aux_loss" not in plain
    routed = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert_close(routed.loss, plain.loss)
    assert [tuple(logits.shape) for logits in routed.router_logits] == [(2 * TOKENS, 8)] * 2
    expected = load_balancing_loss_func(routed.router_logits, 8, 2, mask)
    assert_close(routed.aux_loss, expected)
    model.train()
    assert_close(model(ids, attention_mask=mask, labels=ids).loss, plain.loss)
    trained = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert_close(trained.loss, plain.loss + 0.3 * expected)
    model.config.output_router_logits = True
    assert_close(model(ids, attention_mask=mask, labels=ids).loss, trained.loss)
    as_tuple = model(ids, attention_mask=mask, labels=ids, return_dict=False)
    assert_close(as_tuple[1], expected)


def test_the_mask_of_a_cached_step_is_cut_to_its_tokens():
    model = random_model([MFA] * 2, mixture_of_experts=MOE)
    ids, mask = padded([random_ids(TOKENS), random_ids(5)])
    cache = DynamicCache(config=model.config)
    model(ids[:, :-3], attention_mask=mask[:, :-3], past_key_values=cache)
    step = model(ids[:, -3:], attention_mask=mask, past_key_values=cache, output_router_logits=True)
    assert_close(step.aux_loss, load_balancing_loss(step.router_logits, 2, torch.ones(2, 3)))


def test_accumulated_steps_weigh_the_balancing_loss_by_tokens():
    """Two parts of a batch, as Trainer runs them, have together the weight of one balancing loss."""
    model = random_model([MFA] * 2, torch.float32, mixture_of_experts=MOE, output_router_logits=True).train()
    ids = random_ids(4, TOKENS)
    labels = ids.clone()
    labels[3, 4:] = -100
    items = (labels[:, 1:] != -100).sum()
    parts = [model(ids[rows], labels=labels[rows], num_items_in_batch=items) for rows in (slice(0, 1), slice(1, 4))]
    shares = [(TOKENS - 1) / items, 1 - (TOKENS - 1) / items]
    entropy = model.eval()(ids, labels=labels).loss
    balance = sum(share * part.aux_loss for share, part in zip(shares, parts, strict=True))
    assert_close(sum(part.loss for part in parts), entropy + 0.01 * balance)


# ---- decoders with experts ---------------------------------------------------------------------------------------

MODELS = {
    "mfa": ([MFA] * 2, MOE),
    "second-layer": ([MFA] * 2, MOE | {"layers": [1]}),
    "no-shared": ([MFA] * 2, MOE | {"shared_intermediate_size": 0}),
    "hybrid": (HYBRIDS["hybrid"], MOE | {"layers": [0, 2], "normalize_weights": False}),
}
every_model = pytest.mark.parametrize(("specs", "sizes"), MODELS.values(), ids=MODELS.keys())


@every_model
def test_the_weights_have_the_promised_names(specs, sizes):
    model = random_model(specs, mixture_of_experts=sizes)
    experts = make_experts(sizes)
    for number, layer in enumerate(model.model.layers):
        shapes = {name: tuple(p.shape) for name, p in layer.mlp.named_parameters()}
        if not experts.has_experts(number):
            assert set(shapes) == {f"{name}_proj.weight" for name in ("gate", "up", "down")}
            continue
        shared = experts.shared_intermediate_size
        expected = {
            "router.weight": (8, 32),
            "experts.gate_proj": (8, 16, 32),
            "experts.up_proj": (8, 16, 32),
            "experts.down_proj": (8, 32, 16),
        }
        if shared:
            expected |= {f"shared_expert.{name}_proj.weight": (shared, 32) for name in ("gate", "up")}
            expected |= {"shared_expert.down_proj.weight": (32, shared)}
        assert shapes == expected
        assert sum(p.numel() for p in layer.mlp.parameters()) == experts.parameters(32)


@every_model
def test_every_way_of_running_agrees(specs, sizes):
    model = random_model(specs, mixture_of_experts=sizes)
    rows = [random_ids(length) for length in (TOKENS, 4, 6)]
    ids, mask = padded(rows)
    whole = model(ids, attention_mask=mask).logits
    for row, alone in zip(whole, rows, strict=True):
        assert_close(row[-len(alone) :], model(alone[None]).logits[0], **TIGHT)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=TOKENS + 2)):
        stepped = logits_in_chunks(model, ids, [TOKENS - 3, 1, 1, 1], cache, mask)
        assert_close(stepped[mask == 1], whole[mask == 1], **TIGHT)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, alone in zip(together, rows, strict=True):
        single = model.generate(alone[None], max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
        assert torch.equal(row[-4:], single[0, -4:])


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_check_agrees_in_every_row(specs, sizes, dtype):
    checks = agreement.check_model(random_model(specs, dtype, mixture_of_experts=sizes))
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


@every_model
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(specs, sizes, use_reentrant):
    plain = random_model(specs, mixture_of_experts=sizes, output_router_logits=True, router_aux_loss_coef=5.0).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    unbalanced = copy.deepcopy(plain)
    unbalanced.config.router_aux_loss_coef = 0.0
    ids = random_ids(2, TOKENS)
    for model in (plain, checkpointed, unbalanced):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (name, p), q, r in zip(
        plain.named_parameters(), checkpointed.parameters(), unbalanced.parameters(), strict=True
    ):
        assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")
        if "router" in name:
            assert not torch.allclose(p.grad, r.grad)  # the balancing loss is in it


@every_model
def test_saved_and_loaded_to_the_bit(specs, sizes, tmp_path):
    model = random_model(
        specs, torch.float32, mixture_of_experts=sizes, depth_scaled_init=True, router_aux_loss_coef=0.02
    )
    ids = random_ids(2, TOKENS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.experts_spec() == make_experts(sizes)
    assert loaded.config.router_aux_loss_coef == 0.02
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), name
        q.data = q.data.clone()  # loaded weights lie at any address, and the last bit depends on it
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_initial_weights():
    sizes = MOE | {"intermediate_size": 64, "shared_intermediate_size": 64}
    config = small_config([MFA] * 2, mixture_of_experts=sizes, initializer_range=0.03, depth_scaled_init=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MultimatrixForCausalLM(config).named_parameters()}
    model = MultimatrixForCausalLM(config)
    assert shapes == {name: p.shape for name, p in model.named_parameters()}
    for number, layer in enumerate(model.model.layers, start=1):
        for name, p in layer.mlp.named_parameters():
            expected = 0.03 / (2 * number) ** 0.5 if "down_proj" in name else 0.03
            assert abs(p.std() / expected - 1) < 5 / (2 * p.numel()) ** 0.5, name
    plain = MultimatrixForCausalLM(small_config([MFA] * 2, mixture_of_experts=sizes))
    down = plain.model.layers[0].mlp.experts.down_proj
    assert abs(down.std() / 0.02 - 1) < 5 / (2 * down.numel()) ** 0.5


def test_trainer_trains_every_expert(tmp_path):
    model = MultimatrixForCausalLM(small_config([MFA] * 2, mixture_of_experts=MOE, output_router_logits=True))
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    for name, p in model.named_parameters():
        moved = (p != before[name]).flatten(1).any(1) if "experts" in name else (p != before[name]).any()
        assert moved.all(), name
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        entropy = model.eval()(ids, labels=ids, output_router_logits=False).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(entropy, abs=1e-5)


# ---- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_experts": 0}, "num_experts .* at least 1, got 0"),
        ({"num_experts": 2.5}, "num_experts .* whole number .* got 2.5"),
        ({"num_experts": True}, "num_experts .* got True"),
        ({"experts_per_token": 9}, "9 of 8 experts.* at most 8"),
        ({"intermediate_size": -1}, "intermediate_size .* got -1"),
        ({"shared_intermediate_size": -1}, "shared_intermediate_size .* at least 0, got -1"),
        ({"normalize_weights": 1}, "normalize_weights must be true or false, got 1"),
        ({"layers": [0, 2]}, "no layer 2; num_hidden_layers is 2, so layers are numbered 0 to 1"),
        ({"layers": [-1]}, "no layer -1"),
        ({"layers": [0, 1, 0]}, "layer 0 twice"),
        ({"layers": []}, "layers is empty"),
        ({"layers": "0,1"}, "layers must be a list of layer numbers, got '0,1'"),
        ({"experts": 3}, "no size 'experts'; its sizes are num_experts, experts_per_token"),
    ],
    ids=str,
)
def test_sizes_that_cannot_work_are_refused_in_words(sizes, message):
    with pytest.raises(InputError, match=message):
        small_config([MFA] * 2, mixture_of_experts=MOE | sizes)


def test_missing_sizes_and_settings_without_experts_are_refused():
    with pytest.raises(InputError, match="needs experts_per_token, intermediate_size"):
        small_config([MFA], mixture_of_experts={"num_experts": 3})
    with pytest.raises(InputError, match="output_router_logits needs a router"):
        small_config([MFA], output_router_logits=True)
    with pytest.raises(InputError, match=r"router_aux_loss_coef .* got -0\.1"):
        small_config([MFA], mixture_of_experts=MOE, router_aux_loss_coef=-0.1)


def test_sizes_survive_json(tmp_path):
    sizes = MOE | {"layers": [1], "normalize_weights": False}
    assert make_experts(sizes).to_dict() == sizes
    config = small_config([MFA] * 2, mixture_of_experts=sizes)
    config.save_pretrained(tmp_path)
    assert MultimatrixConfig.from_pretrained(tmp_path).experts_spec() == make_experts(sizes)
    small_config([MFA]).save_pretrained(tmp_path)
    assert MultimatrixConfig.from_pretrained(tmp_path).experts_spec() is None


@every_model
def test_active_parameters_are_those_that_one_token_moves(specs, sizes):
    """Weights with a gradient from one token's hidden state; the others are the experts that it left out."""
    model = random_model(specs, mixture_of_experts=sizes)
    logits = model(random_ids(1, 1)).logits
    logits.square().sum().backward()
    used = 0
    for name, p in model.named_parameters():
        if "experts." in name and "shared" not in name:
            used += int((p.grad != 0).flatten(1).any(1).sum()) * p[0].numel()
        else:
            used += p.numel()
    stated = {"vocab_size": 61, "intermediate_size": 32, "tie_word_embeddings": False}
    assert decoder_parameters(specs, experts=make_experts(sizes), active=True, **stated) == used


@pytest.mark.parametrize("tolerance", [1e-9, 0.002, 0.05])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_the_shared_expert_takes_up_the_difference(tolerance, layers):
    mha = make_spec(32, {"variant": "mha", "num_heads": 8, "head_dim": 8})
    sizes = {"vocab_size": 61, "tie_word_embeddings": True, "intermediate_size": 32}
    experts = ExpertsSpec(**MOE | {"shared_intermediate_size": 400}, layers=layers)
    target = decoder_parameters([mha] * 2, experts=experts, **sizes)
    for specs in ([MFA] * 2, [mha] * 2):
        matched = match_experts(specs, target, experts, tolerance=tolerance, **sizes)
        difference = decoder_parameters(specs, experts=matched, **sizes) - target
        assert abs(difference) / target <= max(tolerance, 0.005)
        # Active parameters are matched by the same number.
        active = [
            decoder_parameters(s, experts=e, active=True, **sizes) for s, e in ((specs, matched), ([mha] * 2, experts))
        ]
        assert active[0] - active[1] == difference
        assert matched.intermediate_size == experts.intermediate_size
    if tolerance == 1e-9:
        assert matched == experts


def test_without_a_shared_expert_each_expert_takes_up_the_difference():
    mha = make_spec(32, {"variant": "mha", "num_heads": 4, "head_dim": 8})
    sizes = {"vocab_size": 61, "tie_word_embeddings": True, "intermediate_size": 32}
    experts = ExpertsSpec(**SIZES | {"intermediate_size": 800})
    target = decoder_parameters([mha] * 2, experts=experts, **sizes)
    matched = match_experts([MFA] * 2, target, experts, tolerance=0.001, **sizes)
    assert matched.shared_intermediate_size == 0
    assert matched.intermediate_size != 800
    assert abs(decoder_parameters([MFA] * 2, experts=matched, **sizes) / target - 1) <= 0.001
    narrow = ExpertsSpec(**SIZES)
    small = decoder_parameters([mha] * 2, experts=narrow, **sizes) + 500
    with pytest.raises(InputError, match=r"no routed expert width brings mha within 0\.5 %"):
        match_experts([mha] * 2, small, narrow, tolerance=0.001, **sizes)
    with pytest.raises(InputError, match="parameters without a routed expert"):
        match_experts([mha] * 2, 100, narrow, tolerance=0.001, **sizes)


def test_sizes_in_one_line():
    assert ExpertsSpec(**MOE).shape == "2 of 8 x 16 + 20"
    assert ExpertsSpec(**SIZES).shape == "2 of 5 x 8"
