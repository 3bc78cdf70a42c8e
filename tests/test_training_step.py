"""A training step: the loss without kept logits, no mask without padding, one compiled graph, one precision."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from cases import DEFAULTS, MODELS, Decoder, random_attention, random_ids, random_model
from multimatrix.attention import module
from multimatrix.attention.module import RMSNorm
from multimatrix.model.layer import DecoderLayer
from multimatrix.model.loss import next_token_loss

every_model = pytest.mark.parametrize("name", MODELS)
TOKENS = 13


class Shapes(TorchDispatchMode):
    """The shape of every tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        self.seen += [tuple(output.shape) for output in outputs if isinstance(output, torch.Tensor)]
        return result


class AutocastOfGPUs(TorchFunctionMode):
    """Autocast on a CPU, and beyond it what a GPU's takes to float32 of all that a model may call."""

    FLOAT32 = (
        *("exp", "expm1", "log", "log_softmax", "logsumexp", "softmax", "softplus", "sum", "prod", "cumsum", "pow"),
        *("rsqrt", "reciprocal", "norm", "rms_norm", "layer_norm", "nll_loss", "cross_entropy"),
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda of: of.float() if of.dtype == torch.bfloat16 else of, (args, kwargs)
            )
        return func(*args, **kwargs)


def labels_with_gaps(ids):
    labels = ids.clone()
    labels[0, :4] = labels[1, 6:] = -100
    return labels


def plain_loss(hidden, weight, labels, num_items=None):
    logits = hidden[:, :-1] @ weight.T
    summed = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return summed / ((labels[:, 1:] != -100).sum() if num_items is None else num_items)


def with_gradients(loss_of, *tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(40)], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 26, 100])
def test_the_loss_and_its_gradients_are_the_plain_ones(chunk, num_items):
    hidden, weight = torch.randn(2, TOKENS, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    labels = labels_with_gaps(torch.randint(0, 50, (2, TOKENS)))
    expected = with_gradients(lambda h, w: plain_loss(h, w, labels, num_items), hidden, weight)
    options = {"num_items_in_batch": num_items, "chunk": chunk}
    actual = with_gradients(lambda h, w: next_token_loss(h, w, labels, **options), hidden, weight)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    again = next_token_loss(hidden, weight, labels, shift_labels=shifted, **options)
    torch.testing.assert_close(again, expected[0], rtol=1e-12, atol=1e-12)


def test_a_part_that_is_frozen_gets_no_gradient():
    labels = random_ids(2, TOKENS)
    hidden, weight = torch.randn(2, TOKENS, 6), torch.randn(61, 6)
    both = with_gradients(lambda h, w: next_token_loss(h, w, labels, chunk=7), hidden, weight)
    (_, of_hidden) = with_gradients(lambda h: next_token_loss(h, weight, labels, chunk=7), hidden)
    (_, of_weight) = with_gradients(lambda w: next_token_loss(hidden, w, labels, chunk=7), weight)
    assert torch.equal(of_hidden, both[1])
    assert torch.equal(of_weight, both[2])
    assert not next_token_loss(hidden, weight, labels).requires_grad


def test_a_second_derivative_is_refused():
    hidden, weight = torch.randn(1, 4, 6, requires_grad=True), torch.randn(61, 6)
    (gradient,) = torch.autograd.grad(next_token_loss(hidden, weight, random_ids(1, 4)), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_a_confident_model_keeps_small_gradients_in_bfloat16():
    """p - 1 is made before it is rounded: 1 - 0.002 is 1 in bfloat16."""
    hidden = torch.tensor([[[6.2], [0.0]]], dtype=torch.bfloat16)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    labels = torch.zeros(1, 2, dtype=torch.long)
    expected = with_gradients(lambda h, w: plain_loss(h, w, labels), hidden.double(), weight.double())
    actual = with_gradients(lambda h, w: next_token_loss(h, w, labels), hidden, weight)
    torch.testing.assert_close([part.double() for part in actual], expected, rtol=1e-2, atol=1e-5)


@every_model
def test_a_model_that_skips_logits_has_the_same_loss_and_gradients(name):
    model = random_model(MODELS[name], output_router_logits="experts" in name).train()
    ids = random_ids(2, TOKENS)
    labels = labels_with_gaps(ids)
    plain = model(ids, labels=labels)
    skipping = model(ids, labels=labels, skip_logits=True)
    assert skipping.logits is None
    torch.testing.assert_close(skipping.loss, plain.loss.double(), rtol=1e-6, atol=0)
    parameters = list(model.parameters())
    actual, expected = (torch.autograd.grad(output.loss, parameters) for output in (skipping, plain))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # transformers' loss works in float32


def test_who_asks_for_logits_gets_them():
    model = random_model(MODELS["mfa"], skip_logits=True)
    ids = random_ids(2, TOKENS)
    assert model(ids).logits.shape == (2, TOKENS, 61)
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, skip_logits=False).logits.shape == (2, TOKENS, 61)
    assert model.generate(ids, max_new_tokens=2).shape == (2, TOKENS + 2)
    assert random_model(MODELS["mfa"])(ids, labels=ids).logits.shape == (2, TOKENS, 61)
    model.lm_head = torch.nn.Sequential(model.lm_head)  # such as an adapter: the head itself has to be asked
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss.double(), plain_loss(model.model(ids)[0], model.lm_head[0].weight, ids))


def test_logits_of_all_tokens_never_exist(monkeypatch):
    monkeypatch.setattr(next_token_loss, "__kwdefaults__", next_token_loss.__kwdefaults__ | {"chunk": 8})
    model = random_model(MODELS["mfa_kr"], vocab_size=4096, skip_logits=True).train()
    ids = random_ids(4, TOKENS)
    largest = {}
    for skip in (False, True):
        with Shapes() as shapes:
            model(ids, labels=ids, skip_logits=skip).loss.backward()
        logits = [shape for shape in shapes.seen if shape[-1:] == (4096,) and shape != (model.config.hidden_size, 4096)]
        largest[skip] = max(torch.Size(shape).numel() for shape in logits)
    assert largest == {False: 4 * TOKENS * 4096, True: 8 * 4096}


@pytest.mark.parametrize("mask", [None, "ones"])
@every_model
def test_no_mask_is_made_where_nothing_is_padded(name, mask):
    """No layer gets one, and nothing has the size of the scores but ALiBi's bias."""
    model = random_model(MODELS[name], torch.float32, vocab_size=64).train()
    tokens, masks = 47, []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[2]))
    ids = torch.randint(0, 64, (2, tokens))
    with Shapes() as shapes:
        model(ids, attention_mask=None if mask is None else torch.ones_like(ids), labels=ids, skip_logits=True)
    assert masks == [None] * len(MODELS[name])
    if all(spec.head_dims[0] == spec.head_dims[1] for spec in MODELS[name]):  # else a CPU has no fused attention
        has_scores = any(shape[-2:] == (tokens, tokens) for shape in shapes.seen)
        assert has_scores == any(spec.position == "alibi" for spec in MODELS[name])


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name != "fpba"])
def test_nothing_is_copied_between_projections_and_attention(name, monkeypatch):
    """Queries are stored token by token, and so is what attention gives: the output projection reads a view."""
    spec = DEFAULTS[name]
    layer = random_attention(spec, torch.float32)
    seen = []

    def attend(q, latents, **options):
        seen.append(q.transpose(1, 2).is_contiguous())
        return q[..., : spec.head_dims[1]]

    monkeypatch.setattr(module, "attend", attend)
    layer(torch.randn(2, TOKENS, spec.hidden_size))
    assert seen == [True]


def test_projections_of_one_input_are_one_product_in_training():
    spec = DEFAULTS["mfa"]
    layer = random_attention(spec, torch.float32).train()
    x = torch.randn(2, TOKENS, spec.hidden_size)
    together = spec.head_dim * 2 + spec.query_rank

    def products():
        with Shapes() as shapes:
            y = layer(x)
        return y, any(shape[-1:] == (together,) for shape in shapes.seen)

    y, fused = products()
    assert fused
    with torch.no_grad():  # weights would be copied for nothing
        plain, fused = products()
    assert not fused
    torch.testing.assert_close(plain, y)
    layer.eval()  # a model that is read gives the same bits, whoever asks
    assert not products()[1]
    layer.train()
    seen = []
    layer.k_proj.register_forward_hook(lambda *_: seen.append(1))  # who looks at a layer sees it run
    hooked, fused = products()
    assert not fused
    assert seen == [1]
    torch.testing.assert_close(hooked, y)


@pytest.mark.parametrize("name", ["hybrid-all", "mfa-experts"])  # the first has every variant in it
def test_a_training_step_is_one_graph(name):
    torch._dynamo.reset()
    model = random_model(MODELS[name], torch.float32, skip_logits=True).train()
    compiled, masks = copy.deepcopy(model), []

    def backend(graph, inputs):
        attention = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
        masks.extend((node.kwargs["attn_mask"], node.kwargs["is_causal"]) for node in attention)
        return aot_eager(graph, inputs)

    compiled.compile(fullgraph=True, backend=backend)
    ids = random_ids(2, TOKENS)
    outputs = [each(ids, labels=ids, use_cache=False) for each in (model, compiled)]
    assert outputs[1].logits is None
    no_bias = [spec for spec in MODELS[name] if spec.position != "alibi"]
    assert masks.count((None, True)) == len(no_bias)
    for output in outputs:
        output.loss.backward()
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    gradients = [[parameter.grad for parameter in each.parameters()] for each in (compiled, model)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["mla", "mfa", "mfa_kr", "mfa-experts"])
def test_layers_compile_once_for_all(name):
    torch._dynamo.reset()
    decoder = Decoder(list(MODELS[name]) * 2, **getattr(MODELS[name], "changes", {}))
    model = random_model(decoder, torch.float32, skip_logits=True).train()
    ids = random_ids(2, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids, labels=ids, use_cache=False).loss
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_layers(fullgraph=True, backend=counter)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
    assert counter.frame_count == 2  # a layer, and the loss


@pytest.mark.parametrize("gpu_list", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_keeps_hidden_states_narrow(name, gpu_list):
    model = random_model(MODELS[name], torch.float32, skip_logits=True).train()
    ids = random_ids(2, TOKENS)
    exact = model(ids, labels=ids).loss
    seen = set()
    for part in model.modules():
        if isinstance(part, (DecoderLayer, RMSNorm)):
            part.register_forward_hook(
                lambda part, inputs, output: seen.add((inputs[0] if isinstance(output, tuple) else output).dtype)
            )
    with torch.autocast("cpu", torch.bfloat16), AutocastOfGPUs() if gpu_list else contextlib.nullcontext():
        loss = model(ids, labels=ids).loss
    assert seen == {torch.bfloat16}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_trainer_sums_over_the_step_and_evaluates_without_logits(tmp_path):
    """Rows of different length in one step: what the model divides by is what Trainer says."""
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in random_ids(8, TOKENS)]
    for number, row in enumerate(rows):
        row["labels"][:number] = -100
    results = {}
    for skip in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(
            model=random_model(MODELS["mfa"], torch.float32, skip_logits=skip),
            args=TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                prediction_loss_only=True,
                disable_tqdm=True,
                optim="sgd",
            ),
            train_dataset=rows,
            eval_dataset=rows,
        )
        loss = trainer.train().training_loss
        results[skip] = [torch.tensor([loss, trainer.evaluate()["eval_loss"]]), *trainer.model.parameters()]
    torch.testing.assert_close(results[True], results[False], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_large_vocabulary():
    tokens, vocab = 16_384, 131_072
    hidden = torch.randn(1, tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (1, tokens), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    next_token_loss(hidden, weight, labels).backward()
    # A chunk's logits four times over; the plain loss keeps more than twice as many of all tokens.
    assert torch.cuda.max_memory_allocated() - before < 0.9 * tokens * vocab * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name in DEFAULTS if "alibi" not in name])  # whose slopes are copied there
def test_a_step_does_not_wait_for_the_device(name):
    torch.use_deterministic_algorithms(False)
    model = random_model([DEFAULTS[name]] * 2, torch.float32, skip_logits=True).train().cuda()
    ids, items = random_ids(2, TOKENS).cuda(), torch.tensor(20, device="cuda")
    for mode in ("default", "error"):  # whatever is made once is made before
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                model(ids, labels=ids, num_items_in_batch=items, use_cache=False).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
