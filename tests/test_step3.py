"""Step-3's checkpoints in and out: the same function, the same bits, and the sizes that loaders take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from damage import change_weights
from multimatrix import MultimatrixForCausalLM
from multimatrix.convert.step3 import export_step3, import_step3
from multimatrix.convert.step3_config import loads_exactly, to_step3
from multimatrix.errors import InputError
from step3 import (
    KINDS,
    read_fields,
    read_tensors,
    step3_fields,
    step3_logits,
    step3_tensors,
    write_step3,
)
from step3_models import ATTENTION, MIXTURE, our_config, our_model, same_bits, saved

TOKENS = 11
every_kind = pytest.mark.parametrize("kind", KINDS)


def random_ids() -> torch.Tensor:
    return torch.randint(0, 61, (TOKENS,))


def loaded(folder: Path, dtype: torch.dtype) -> MultimatrixForCausalLM:
    model, found = MultimatrixForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


# ---- the same function -------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shards", [1, 3])
def test_an_imported_checkpoint_is_the_function_of_the_description(kind, shards, tmp_path):
    fields = step3_fields(**KINDS[kind])
    tensors = step3_tensors(fields)
    import_step3(write_step3(tmp_path / "step3", fields, tensors, shards), tmp_path / "ours")
    ids = random_ids()
    expected = step3_logits(fields, tensors, ids)
    with torch.no_grad():
        exact = loaded(tmp_path / "ours", torch.float64)(ids[None]).logits[0]
        single = loaded(tmp_path / "ours", torch.float32)(ids[None]).logits[0]
    assert expected.std() > 0.1  # something to compare
    assert_close(exact, expected, rtol=1e-10, atol=1e-10)
    assert_close(single.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "mixture", [None, {**MIXTURE, "layers": [1]}, {**MIXTURE, "normalize_weights": False}], ids=["dense", "one", "all"]
)
def test_an_exported_model_is_the_function_of_the_description(mixture, tmp_path):
    model = our_model(mixture_of_experts=mixture)
    export_step3(saved(tmp_path / "ours", model), tmp_path / "step3", max_shard_size=20_000)
    ids = random_ids()
    expected = step3_logits(read_fields(tmp_path / "step3"), read_tensors(tmp_path / "step3"), ids)
    with torch.no_grad():
        assert_close(model(ids[None]).logits[0], expected, rtol=1e-10, atol=1e-10)


# ---- the same bits -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_shard_size", [10**9, 20_000], ids=["whole", "sharded"])
def test_step3_to_ours_to_step3_keeps_every_bit(kind, dtype, max_shard_size, tmp_path):
    fields = step3_fields(**KINDS[kind], torch_dtype=str(dtype).removeprefix("torch."), eos_token_id=[2, 3])
    tensors = step3_tensors(fields, dtype)
    # Every bit pattern there is in 16 bits, NaNs with their payloads, infinities and negative zero among them.
    patterns = torch.arange(2**15, dtype=torch.int32)[: 61 * 32 // 2] * 67 + 0x7F80
    tensors["lm_head.weight"].flatten().view(torch.int16)[: len(patterns)] = patterns.to(torch.int16)
    write_step3(tmp_path / "step3", fields, tensors, shards=2)
    done = import_step3(tmp_path / "step3", tmp_path / "ours", max_shard_size)
    export_step3(tmp_path / "ours", tmp_path / "back", max_shard_size)
    assert same_bits(read_tensors(tmp_path / "back"), tensors)
    assert read_fields(tmp_path / "back") == fields
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_size < 10**9)
    assert set(files) < set(done.files)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (len(files) > 1)


@pytest.mark.parametrize("mixture", [None, {**MIXTURE, "layers": [0, 2]}, MIXTURE], ids=["dense", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_ours_to_step3_to_ours_keeps_every_bit(mixture, dtype, shard_size, tmp_path):
    model = our_model(dtype, mixture_of_experts=mixture, bos_token_id=1, pad_token_id=0)
    saved(tmp_path / "ours", model, max_shard_size=shard_size)
    export_step3(tmp_path / "ours", tmp_path / "step3")
    import_step3(tmp_path / "step3", tmp_path / "back")
    assert same_bits(read_tensors(tmp_path / "back"), read_tensors(tmp_path / "ours"))
    assert read_fields(tmp_path / "back") == read_fields(tmp_path / "ours")


def test_tensors_of_several_dtypes_stay_what_they_are(tmp_path):
    fields = step3_fields(**KINDS["experts"])
    tensors = step3_tensors(fields, torch.bfloat16)
    for name in ("model.layers.1.moe.gate.weight", "model.norm.weight"):
        tensors[name] = tensors[name].float()
    import_step3(write_step3(tmp_path / "step3", fields, tensors), tmp_path / "ours")
    export_step3(tmp_path / "ours", tmp_path / "back")
    assert same_bits(read_tensors(tmp_path / "back"), tensors)


def test_tied_embeddings_are_written_twice(tmp_path):
    model = our_model(tie_word_embeddings=True)
    done = export_step3(saved(tmp_path / "ours", model), tmp_path / "step3")
    assert "second copy of the tied embedding" in done.lines[-1]
    tensors, fields = read_tensors(tmp_path / "step3"), read_fields(tmp_path / "step3")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert fields["tie_word_embeddings"] is False
    import_step3(tmp_path / "step3", tmp_path / "back")
    change_weights(tmp_path / "ours", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    export_step3(tmp_path / "ours", tmp_path / "again")  # a head that is stored as well is the same head
    assert same_bits(read_tensors(tmp_path / "again"), tensors)
    ids = random_ids()[None]
    with torch.no_grad():
        assert_close(loaded(tmp_path / "back", torch.float64)(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)


def test_tokenizer_and_generation_settings_come_along(tmp_path):
    write_step3(tmp_path / "step3", step3_fields(), step3_tensors(step3_fields()))
    texts = {"generation_config.json": '{"eos_token_id": 7}', "tokenizer.json": "{}", "chat_template.jinja": "{{x}}"}
    for name, text in texts.items():
        (tmp_path / "step3" / name).write_text(text)
    (tmp_path / "step3" / "modeling_step3.py").write_text("raise SystemExit")
    import_step3(tmp_path / "step3", tmp_path / "ours")
    export_step3(tmp_path / "ours", tmp_path / "back")
    for folder in ("ours", "back"):
        assert {name: (tmp_path / folder / name).read_text() for name in texts} == texts
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == sorted(
            [*texts, "config.json", "model.safetensors"]
        )


def test_the_language_model_of_a_vision_checkpoint(tmp_path):
    text = step3_fields(**KINDS["experts"])
    tensors = step3_tensors(text)
    vision = {"vision_model.embeddings.weight": torch.ones(3), "vit_large_projector.bias": torch.ones(2)}
    outside = {"model_type": "step3_vl", "architectures": ["Step3VLForConditionalGeneration"], "vision_config": {}}
    write_step3(tmp_path / "vl", outside | {"text_config": text, "eos_token_id": 5}, tensors | vision)
    done = import_step3(tmp_path / "vl", tmp_path / "ours")
    assert done.notes == ("2 tensors of the vision part are left out",)
    assert read_fields(tmp_path / "ours")["eos_token_id"] == 5
    write_step3(tmp_path / "text", text | {"eos_token_id": 5}, tensors)
    import_step3(tmp_path / "text", tmp_path / "expected")
    assert read_fields(tmp_path / "ours") == read_fields(tmp_path / "expected")
    assert same_bits(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "expected"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the largest memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """Four shards of 50 MB, in and out, in a process that grows by less than one tensor."""
    fields = step3_fields(hidden_size=1024, intermediate_size=8192, num_hidden_layers=4, torch_dtype="bfloat16")
    write_step3(tmp_path / "small", step3_fields(), step3_tensors(step3_fields()))
    tensors = step3_tensors(fields, torch.bfloat16)
    write_step3(tmp_path / "step3", fields, tensors, shards=4)
    code = """
import re, sys
from pathlib import Path
from multimatrix.convert.step3 import export_step3, import_step3
def memory(kind): return int(re.search(kind + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1000
folder = Path(sys.argv[1])
import_step3(folder / "small", folder / "small-ours")
export_step3(folder / "small-ours", folder / "small-back")
before = memory("VmRSS")
import_step3(folder / "step3", folder / "ours", 50 * 10**6)
export_step3(folder / "ours", folder / "back", 50 * 10**6)
print(memory("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert sum(t.nbytes for t in tensors.values()) > 200 * 10**6
    assert 0 < int(done.stdout) < 10 * 10**6
    assert len(list((tmp_path / "back").glob("*.safetensors"))) >= 4
    assert same_bits(read_tensors(tmp_path / "back"), tensors)


# ---- what engines read -------------------------------------------------------------------------------------------

# Read without a default, or with one that is Step-3's own size, by vLLM's step3_text model, its config class and its
# description of architectures (vLLM 0.11 to 0.33), and by SGLang's model.
ENGINE_FIELDS = {
    "architectures": list,
    "model_type": str,
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_attention_groups": int,
    "head_dim": int,
    "share_q_dim": int,
    "max_seq_len": int,
    "max_position_embedding": int,
    "rope_theta": float,
    "rms_norm_eps": float,
    "moe_layers_enum": str,
    "moe_num_experts": int,
    "moe_top_k": int,
    "moe_intermediate_size": int,
    "share_expert_dim": int,
    "norm_expert_weight": bool,
    "tie_word_embeddings": bool,
    "torch_dtype": str,
}


@pytest.mark.parametrize("mixture", [None, MIXTURE, {**MIXTURE, "layers": [2, 0]}], ids=["dense", "all", "some"])
def test_config_has_every_field_that_engines_read(mixture, tmp_path):
    export_step3(saved(tmp_path / "ours", our_model(mixture_of_experts=mixture)), tmp_path / "step3")
    fields = read_fields(tmp_path / "step3")
    assert {name: type(fields.get(name)) for name in ENGINE_FIELDS} == ENGINE_FIELDS
    assert fields["architectures"] == ["Step3TextForCausalLM"]
    assert fields["model_type"] == "step3_text"
    assert fields["max_seq_len"] == fields["max_position_embedding"] == 128
    assert not fields["tie_word_embeddings"]
    listed = {None: "-1"}.get(mixture) if mixture is None else "0,2" if "layers" in mixture else "0,1,2"
    assert fields["moe_layers_enum"] == listed


def rows_as_loaded(rank: int, dim: int) -> list[int]:
    """Which row of q, k, v (numbered through) a loader puts where; -1 is left as it was, an error where none fits."""
    total = rank + 2 * dim
    filled = [-1] * total
    for first, size in ((0, rank), (rank, dim), (rank + dim, dim)):
        begin, end = int(first / total * total), int((first + size) / total * total)
        if end - begin != size:
            return []
        filled[begin:end] = range(first, first + size)
    return filled


def test_sizes_that_loaders_round_are_known():
    bad = [(1984, 256), (1472, 512), (4032, 192)]
    assert not any(loads_exactly(*sizes) for sizes in bad)
    assert loads_exactly(2048, 256)
    for rank in [*range(1, 130), *range(192, 4097, 64)]:
        for dim in (2, 16, 24, 38, 64, 128, 192, 256, 512):
            right = rows_as_loaded(rank, dim) == list(range(rank + 2 * dim))
            assert loads_exactly(rank, dim) == right, (rank, dim)
    assert {(rank, dim) for rank in range(64, 4097, 64) for dim in (192, 256) if not loads_exactly(rank, dim)} == {
        (1984, 256),
        (4032, 192),
    }


@pytest.mark.parametrize(("rank", "dim"), [(1984, 256), (1472, 512), (4032, 192), (1, 24), (2, 46)])
def test_sizes_that_loaders_round_are_refused_with_sizes_that_work(rank, dim):
    config = our_config(attention=ATTENTION | {"query_rank": rank, "head_dim": dim})
    with pytest.raises(InputError, match=rf"query_rank {rank} with head_dim {dim}") as caught:
        to_step3(config)
    found = re.search(r"nearest that work are query_rank (\d+) or head_dim (\d+)$", str(caught.value))
    other_rank, other_dim = int(found[1]), int(found[2])
    for change in ({"query_rank": other_rank}, {"head_dim": other_dim}):
        sizes = ATTENTION | {"query_rank": rank, "head_dim": dim} | change
        fields = to_step3(our_config(attention=sizes))
        assert rows_as_loaded(fields["share_q_dim"], fields["head_dim"]) == list(
            range(fields["share_q_dim"] + 2 * fields["head_dim"])
        )
    # Nothing nearer works.
    step = max(power for power in (1, 2, 4, 8, 16, 32, 64) if rank % power == 0)
    nearer = [near for near in range(step, 2 * rank + 1, step) if abs(near - rank) < abs(other_rank - rank)]
    assert rank in nearer
    assert not any(rows_as_loaded(near, dim) == list(range(near + 2 * dim)) for near in nearer)
