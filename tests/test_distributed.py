"""Two processes agree with one: tensor parallelism in inference, FSDP2 in training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import CASES, MODELS, random_ids, random_model, small_config
from multimatrix.attention import make_spec
from multimatrix.errors import InputError

HERE = Path(__file__).parent
PROCESSES = 2
# One process cuts what the other replicates: refused, see below.
REFUSED = {"hybrid", "hybrid-all", "hybrid-positions"}
SUBJECTS = MODELS | {
    name: [CASES[name]] * 2 for name in ("mla-query_rank=12", "mfa_kr-position=alibi", "mha-position=alibi")
}


def launch(kind: str, root: Path) -> None:
    """Run the worker on every folder below `root`."""
    paths = [str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    done = subprocess.run(
        [*launcher, str(HERE / "distributed_worker.py"), kind, str(root)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Model -> kind -> what each process found."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, specs in SUBJECTS.items():
        model = random_model(specs, vocab_size=62)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        model.save_pretrained(root / name)
        ids = random_ids(4, 9)
        reference = {"ids": ids, "logits": model(ids).logits.detach(), "parameters": model.num_parameters()}
        reference["tokens"] = model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        reference["trained"] = {name: p.detach() for name, p in model.named_parameters()}
        torch.save(reference, root / name / "reference.pt")
    for kind in ("tensor_parallel", "fsdp"):
        launch(kind, root)
    return {
        name: {
            kind: [json.loads((root / name / f"{kind}-{rank}.json").read_text()) for rank in range(PROCESSES)]
            for kind in ("tensor_parallel", "fsdp")
        }
        | {"reference": torch.load(root / name / "reference.pt")}
        for name in SUBJECTS
    }


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name not in REFUSED])
def test_tensor_parallel_logits_equal_one_process(found, name):
    reference, specs = found[name]["reference"], SUBJECTS[name]
    for process in found[name]["tensor_parallel"]:
        assert "error" not in process, process
        assert max(process["differences"].values()) < 1e-10
        assert process["tokens"] == reference["tokens"]
        # Key heads are shared out, a single one is replicated.
        heads = [spec.cache.key[0] for spec in specs]
        assert process["key_heads"] == [h // PROCESSES if h > 1 else 1 for h in heads]
        assert process["parameters"] < 0.8 * reference["parameters"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_tensor_parallel_layers_that_need_different_plans_are_refused(found, name):
    for process in found[name]["tensor_parallel"]:
        assert process["error"].startswith("InputError: tensor parallelism cuts k_proj in all layers or in none")


@pytest.mark.parametrize("name", SUBJECTS)
def test_fsdp_step_equals_one_process(found, name):
    for process in found[name]["fsdp"]:
        assert "error" not in process, process
        assert process["difference"] < 1e-7  # the loss function of transformers works in float32
        assert process["parameters"] < 0.6 * found[name]["reference"]["parameters"]


@pytest.mark.parametrize(
    ("sizes", "processes", "sentence"),
    [
        ({"variant": "mfa", "num_heads": 18, "head_dim": 8, "query_rank": 8}, 4, "mfa: 18 heads .* 4 processes"),
        ({"variant": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}, 4, "gqa: 2 key heads .* 4 processes"),
        ({"variant": "mha", "num_heads": 5, "head_dim": 8}, 2, "mha: 5 heads .* 2 processes"),
    ],
)
def test_heads_that_do_not_divide_are_refused(sizes, processes, sentence):
    config = small_config([make_spec(32, sizes)] * 2)
    with pytest.raises(InputError, match=sentence):
        config.check_tensor_parallel(processes)
    config.check_tensor_parallel(1)


def test_training_under_tensor_parallelism_is_refused():
    model = random_model(MODELS["mfa"])
    model.model.tensor_parallel_processes = 2
    with pytest.raises(ValueError, match="tensor parallelism is for inference"):
        model.train()(random_ids(1, 3))
