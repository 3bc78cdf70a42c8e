"""The strict loader: a folder is either a model of ours, whole, or refused in one sentence before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cases import DECODERS, random_ids, random_model
from damage import WEIGHTS as FILE
from damage import change_config, change_index, change_weights, cut
from multimatrix import InputError, MultimatrixConfig, MultimatrixForCausalLM
from multimatrix.model.loading import load_config, load_model

SPECS = DECODERS["hybrid"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One model in a single file, and in shards."""
    folder = tmp_path_factory.mktemp("saved")
    model = random_model(SPECS, torch.float32)
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    return folder


@pytest.fixture
def single(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "single", tmp_path / "model"))


@pytest.fixture
def shards(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "shards", tmp_path / "model"))


@pytest.fixture(autouse=True)
def nothing_is_loaded(request, monkeypatch):
    """A folder that is refused is refused before transformers reads a weight."""
    if "refused" in request.node.name:

        def fail(*args, **kwargs):
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(MultimatrixForCausalLM, "from_pretrained", fail)


def assert_refused(folder: Path, *fragments: str) -> None:
    with pytest.raises(InputError) as refusal:
        load_model(folder)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    for fragment in (str(folder), *fragments):
        assert fragment in sentence


# ---- what is loaded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["single", "shards"])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_weights_are_those_that_were_saved(saved, form, dtype):
    stored = {name: tensor for path in (saved / form).glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert len(list((saved / form).glob("*.safetensors"))) == (1 if form == "single" else 7)
    model = load_model(saved / form, dtype=dtype)
    assert type(model) is MultimatrixForCausalLM
    assert not model.training
    found = model.state_dict()
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        assert tensor.dtype == (dtype or torch.float32)
        assert torch.equal(tensor, stored[name].to(tensor.dtype))


def test_stored_dtype_wins_over_the_one_of_the_config(single):
    change_weights(single, lambda weights: weights.update({name: w.bfloat16() for name, w in weights.items()}))
    assert load_model(single).dtype == torch.bfloat16
    change_weights(single, lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"].half()}))
    assert {p.dtype for p in load_model(single).parameters()} == {torch.float32}  # what holds both


@pytest.mark.parametrize("head", ["absent", "present"])
def test_tied_weights(tmp_path, head):
    random_model(SPECS, torch.float32, tie_word_embeddings=True).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    if head == "present":
        change_weights(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


def test_fields_that_transformers_reads_are_known(single):
    change_config(
        single,
        auto_map={"AutoConfig": "configuration_multimatrix.MultimatrixConfig"},
        torch_dtype="float32",
        do_sample=True,
        max_length=20,
        num_labels=2,
        quantization_config=None,
        _name_or_path="somewhere",
        provenance={"seed": 3},
    )
    assert load_model(single).config.provenance == {"seed": 3}
    change_config(single, rope_theta=5e5, rope_parameters=None)
    assert load_config(single).rope_parameters["rope_theta"] == 5e5


def test_not_finite_weights_are_weights(single):
    change_weights(single, lambda weights: weights["lm_head.weight"].fill_(float("nan")))
    assert load_model(single)(random_ids(1, 3)).logits.isnan().all()


# ---- what is refused ---------------------------------------------------------------------------------------------

HEAD = "lm_head.weight"
NORM = "model.norm.weight"


def write_header(folder: Path, header: bytes, data: bytes = b"") -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


CONFIGS = {
    "no file": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json cannot be read as JSON"),
    "cut": (lambda f: (f / "config.json").write_text('{"model_type": "mul'), "config.json cannot be read as JSON"),
    "a number": (lambda f: (f / "config.json").write_text("7"), "holds a JSON int, not an object"),
    "no type": (
        lambda f: change_config(f, model_type=None),
        "config.json names no model_type",
    ),
    "another": (lambda f: change_config(f, model_type="llama"), "no multimatrix model: it holds a 'llama' model"),
    "typing error": (lambda f: change_config(f, num_hiden_layers=2), "'num_hiden_layers'", "mean 'num_hidden_layers'?"),
    "unknown": (lambda f: change_config(f, kv_lora_rank=2), "'kv_lora_rank'", "or update multimatrix"),
    "wrong kind": (
        lambda f: change_config(f, rms_norm_eps="small"),
        "describes no model that works",
        "'rms_norm_eps' with value 'small'",
    ),
    "a word for a switch": (lambda f: change_config(f, use_cache="yes"), "'use_cache' expected bool"),
    "size of the variant": (lambda f: change_config(f, attention={"variant": "mha", "heads": 4}), "no size 'heads'"),
    "quantized": (lambda f: change_config(f, quantization_config={"quant_method": "x"}), "is quantized"),
    "generation cut": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json cannot be read as JSON",
    ),
    "generation a list": (lambda f: (f / "generation_config.json").write_text("[]"), "holds a JSON list"),
}
WEIGHTS = {
    "none": (
        lambda f: (f / "model.safetensors").unlink(),
        "neither model.safetensors nor model.safetensors.index.json",
    ),
    "index as well": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "has both model.safetensors and model.safetensors.index.json",
    ),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "holds pytorch_model.bin, and only safetensors are read",
    ),
    "empty file": (lambda f: cut(f / FILE, 0), "it has 0 bytes, and its header alone needs 8"),
    "cut in the header": (lambda f: cut(f / FILE, 100), "it has 100 bytes, and its header alone needs "),
    "cut in the data": (lambda f: cut(f / FILE, 50_000), "it has 50,000 bytes, and its tensors need "),
    "longer": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"\0" * 3),
        " bytes, and its tensors need ",
    ),
    "text": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "its header alone needs "),
    "header no JSON": (lambda f: write_header(f, b"{no"), "its header is no table of tensors"),
    "header a list": (lambda f: write_header(f, b"[1]"), "its header is no table of tensors"),
    "header and shape": (
        lambda f: write_header(f, b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}', b"\0" * 4),
        "is cut short or damaged",
    ),
    "wrong shape": (
        lambda f: change_weights(f, lambda w: w.update({NORM: torch.zeros(31)})),
        f"{NORM} is [31] in model.safetensors and [32] by config.json;",
    ),
    "two wrong shapes": (
        lambda f: change_weights(f, lambda w: w.update({NORM: torch.zeros(31), HEAD: torch.zeros(61, 33)})),
        "by config.json (1 more tensor differs);",
    ),
    "missing": (
        lambda f: change_weights(f, lambda w: w.pop(HEAD)),
        f"{HEAD} is in no file and [61, 32] by config.json;",
    ),
    "surplus": (
        lambda f: change_weights(f, lambda w: w.update({"bias": torch.zeros(2, 3)})),
        "bias is [2, 3] in model.safetensors and not in the model of config.json;",
    ),
    "whole numbers": (
        lambda f: change_weights(f, lambda w: w.update({NORM: torch.ones(32, dtype=torch.int8)})),
        f"{NORM} is stored as I8",
        "F32",
    ),
    "more layers": (
        lambda f: change_config(
            f, num_hidden_layers=3, attention=json.loads((f / "config.json").read_text())["attention"][0]
        ),
        "by config.json (",
        "more tensors differ)",
    ),
}


@pytest.mark.parametrize(("damage", "fragments"), [(d, f) for d, *f in CONFIGS.values()], ids=CONFIGS)
def test_refused_config(single, damage, fragments):
    damage(single)
    assert_refused(single, *fragments)


@pytest.mark.parametrize(("damage", "fragments"), [(d, f) for d, *f in WEIGHTS.values()], ids=WEIGHTS)
def test_refused_weights(single, damage, fragments):
    damage(single)
    assert_refused(single, *fragments)


def test_refused_folders(tmp_path):
    assert_refused(tmp_path / "nowhere", "there is no folder")
    (tmp_path / "file").write_text("x")
    assert_refused(tmp_path / "file", "there is no folder")
    assert_refused(tmp_path, "has no config.json")


def test_refused_sizes_of_a_cut_file(single):
    """The sizes in the sentence are those of the file and of its header's last tensor."""
    path = single / "model.safetensors"
    whole = path.stat().st_size
    cut(path, -1)
    assert_refused(single, f"it has {whole - 1:,} bytes, and its tensors need {whole:,}")


def second_shard(folder: Path) -> str:
    return sorted(path.name for path in folder.glob("*.safetensors"))[1]


def test_refused_shard_missing(shards):
    shard = second_shard(shards)
    (shards / shard).unlink()
    assert_refused(shards, f"lacks {shard}, a shard that its model.safetensors.index.json names")


def test_refused_shard_cut(shards):
    shard = second_shard(shards)
    cut(shards / shard, -5)
    assert_refused(shards, shard, "its tensors need")


def test_refused_index_naming_tensors_a_shard_lacks(shards):
    shard = second_shard(shards)
    names = list(load_file(shards / shard))
    change_weights(shards, lambda weights: weights.pop(names[0]), shard)
    assert_refused(shards, f"{shard} has no {names[0]}")


def test_refused_index_that_misses_or_misplaces_a_tensor(shards):
    change_index(shards, lambda placed: placed.pop(NORM))
    assert_refused(shards, f"holds {NORM} and model.safetensors.index.json does not list it")
    first = sorted(path.name for path in shards.glob("*.safetensors"))[0]
    change_index(shards, lambda placed: placed.update({NORM: first}))
    assert_refused(shards, f"holds {NORM} and model.safetensors.index.json places it in {first}")


def test_refused_index_without_a_map(shards):
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (shards / "model.safetensors.index.json").write_text(text)
        assert_refused(shards, "has no weight_map")
    (shards / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    assert_refused(shards, "has no weight_map from tensors to files beside it")


def test_refused_sharded_shape(shards):
    shard = second_shard(shards)
    name = next(iter(load_file(shards / shard)))
    change_weights(shards, lambda weights: weights.update({name: torch.zeros(1, 2, 3)}), shard)
    assert_refused(shards, f"{name} is [1, 2, 3] in {shard} and [")


def test_refused_file_that_cannot_be_opened(single, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("multimatrix.model.saved_files.safe_open", denied)
    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr("multimatrix.model.loading.load_config", lambda folder: MultimatrixConfig())
    assert_refused(single, "model.safetensors is cut short or damaged: [Errno 13] Permission denied")
