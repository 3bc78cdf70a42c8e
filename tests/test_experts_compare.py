"""A comparison of decoders with a mixture of experts."""

from __future__ import annotations

import csv
import functools
import json
import random

import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from command import multimatrix
from multimatrix.compare import execute, figures
from multimatrix.compare.configuration import make_comparison
from multimatrix.compare.matching import match
from multimatrix.data import load_corpus, pack
from multimatrix.errors import InputError
from multimatrix.model.mixture import MixtureOfExperts
from multimatrix.model.modeling import MultimatrixForCausalLM

STEPS = 6
EXPERTS = ["--experts", 4, "--experts-per-token", 2, "--expert-size", 16, "--shared-expert-size", 64]
SMALL = ["--hidden-size", 32, "--head-dim", 8, "--layers", 2, "--context", 32, "--steps", STEPS, "--batch-size", 4]
SMALL += ["--evaluations", 2, "--validation-tokens", 256, "--learning-rate", 3e-3]
SMALL += ["--variants", "mha,mfa_kr", "--seeds", 0]
RUNS = ("mha-seed0", "mfa_kr-seed0")


def compare(out, text, *words):
    return multimatrix("compare", "--data", text, *SMALL, "--out", out, *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The text, a finished comparison, what it printed, and what every forward pass while training gave."""
    folder = tmp_path_factory.mktemp("experts")
    shuffle = random.Random(0)
    rows = [{"text": " ".join(shuffle.choice(["fox", "hen", "rain"]) for _ in range(60))} for _ in range(60)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    forward, seen = MultimatrixForCausalLM.forward, []

    @functools.wraps(forward)
    def spy(self, input_ids=None, labels=None, **words):
        output = forward(self, input_ids, labels=labels, **words)
        if labels is not None:
            seen.append((self.training, labels, output))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultimatrixForCausalLM, "forward", spy)
        patch.setattr(figures, "loss_against_tokens", lambda results, directory: Figure())
        patch.setattr(figures, "loss_against_kv_bytes", lambda results: Figure())
        done = compare(folder / "out", folder / "text.jsonl", *EXPERTS)
    assert done.status == 0, done.err
    return folder, done, seen


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_training_is_balanced_and_validation_is_not(finished):
    folder, _, seen = finished
    kinds = [training for training, _, _ in seen]
    assert kinds.count(True) == 2 * STEPS
    assert kinds.count(False) > 0
    for training, labels, output in seen:
        log_p = output.logits.detach()[:, :-1].float().log_softmax(-1)
        entropy = -log_p.gather(-1, labels[:, 1:, None]).mean()
        balance = load_balancing_loss_func(output.router_logits, 4, 2)
        torch.testing.assert_close(output.loss, entropy + 0.01 * balance if training else entropy)
    name = "mfa_kr-seed0"
    logged = [json.loads(line) for line in (folder / "out/runs" / name / "metrics.jsonl").read_text().splitlines()]
    losses = [output.loss.item() for training, _, output in seen[-len(seen) // 2 :] if training]
    assert [row["loss"] for row in logged if "loss" in row] == pytest.approx(losses, abs=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_the_reported_loss_is_the_saved_models_cross_entropy(finished, name):
    folder, _, _ = finished
    model = MultimatrixForCausalLM.from_pretrained(folder / "out/runs" / name / "model").eval()
    assert model.config.output_router_logits is False
    tokenizer = AutoTokenizer.from_pretrained(folder / "out/runs" / name / "model")
    packed = pack(load_corpus([str(folder / "text.jsonl")]), tokenizer, context=32)
    ids = torch.from_numpy(packed.validation[: 256 // 32]).long()
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    stored = read(folder / "out/runs" / name / "result.json")
    assert loss == pytest.approx(stored["validation_loss"], abs=1e-5)
    assert stored["identity"]["mixture_of_experts"] == model.config.experts_spec().to_dict()


def test_parameters_are_matched_in_total_and_active(finished):
    folder, done, _ = finished
    mha, kr = read(folder / "out/results.json")["rows"]
    for row, name in ((mha, RUNS[0]), (kr, RUNS[1])):
        model = MultimatrixForCausalLM.from_pretrained(folder / "out/runs" / name / "model")
        assert sum(p.numel() for p in model.parameters()) == row["parameters"]
        # Two of four experts of 3 x 32 x 16 in two layers are left out by a token.
        assert row["parameters"] - row["active_parameters"] == 2 * 2 * 3 * 32 * 16
        assert f"{row['feed_forward']}".startswith("2 of 4 x 16 + ")
    assert abs(kr["parameters"] / mha["parameters"] - 1) <= 0.005
    assert kr["active_parameters"] - mha["active_parameters"] == kr["parameters"] - mha["parameters"]
    assert kr["feed_forward"] != mha["feed_forward"] == "2 of 4 x 16 + 64"
    with (folder / "out/results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(line["active_parameters"]) for line in table] == [mha["active_parameters"], kr["active_parameters"]]
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    for shown in (
        ">active<",
        "2 of 4×16 + 64",
        "width of the shared expert",
        "The training loss has the load-balancing",
    ):
        assert shown in page
    assert done.out.count("active") == 2  # the matched sizes and the results


def test_the_saved_model_is_checked(finished):
    folder, _, _ = finished
    done = multimatrix("check", folder / "out/runs/mfa_kr-seed0/model", "--json")
    assert (done.status, json.loads(done.out)["passed"]) == (0, True)


def test_the_same_command_resumes_and_other_experts_are_refused(finished, monkeypatch):
    folder, _, _ = finished
    monkeypatch.setattr(figures, "loss_against_tokens", lambda results, directory: Figure())
    monkeypatch.setattr(figures, "loss_against_kv_bytes", lambda results: Figure())
    monkeypatch.setattr(execute, "train", None)
    done = compare(folder / "out", folder / "text.jsonl", *EXPERTS)
    assert done.status == 0
    assert "2 of 2 runs are done already" in done.err
    for words, fragment in (
        ([*EXPERTS[:-1], 96], "shared_expert_size = 64 and this comparison has 96"),
        ([*EXPERTS[:2], "--experts-per-token", 1, *EXPERTS[4:]], "experts_per_token = 2 and this comparison has 1"),
        ([], "num_experts = 4 and this comparison has None"),
    ):
        assert fragment in compare(folder / "out", folder / "text.jsonl", *words).sentence


def test_a_dense_comparison_knows_nothing_of_experts(finished):
    folder, _, _ = finished
    done = compare(folder / "dense", folder / "text.jsonl", "--dry-run")
    assert "active" not in done.out
    candidate = match(make_comparison(None, {"hidden_size": 32, "head_dim": 8}), 257)[0]
    assert candidate.experts is None
    assert candidate.active_parameters == candidate.parameters
    assert not {"active_parameters", "mixture_of_experts", "feed_forward"} & set(candidate.row())


@pytest.mark.parametrize("k", [1, 2])
def test_the_router_of_every_comparison_can_learn(k):
    """A token's only weight divided by itself is 1, whatever the router says."""
    sizes = {"num_experts": 4, "experts_per_token": k, "expert_size": 8}
    module = MixtureOfExperts(make_comparison(None, sizes).experts, 16)
    module(torch.randn(2, 5, 16))[0].square().sum().backward()
    assert module.router.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 4}, "needs num_experts, experts_per_token, expert_size; give also experts_per_token, expert"),
        ({"shared_expert_size": 4}, "give also num_experts, experts_per_token, expert_size"),
        ({"num_experts": 4, "experts_per_token": 5, "expert_size": 8}, "cannot take 5 of 4"),
        ({"num_experts": 4, "experts_per_token": 2, "expert_size": 0}, "expert_size must be at least 1, got 0"),
        (
            {"num_experts": 4, "experts_per_token": 2, "expert_size": 8, "intermediate_size": 64},
            "intermediate_size has no effect",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_comparison(None, settings)
