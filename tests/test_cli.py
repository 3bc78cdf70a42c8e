"""Bad input is one sentence and exit status 2, `check` can fail in every row, and --json is JSON."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from command import multimatrix
from multimatrix.attention import VARIANTS, CacheLayout, make_spec
from multimatrix.attention import module as attention_module
from multimatrix.attention.mfa_kr import MFAKRSpec
from multimatrix.evaluate import agreement
from multimatrix.model import modeling
from multimatrix.model.feed_forward import SwiGLU
from multimatrix.ops.rotary import Rotation

CHECKS = [
    "oracle",
    "training / decoding",
    "prefill / chunked",
    "batch / single",
    "padded / not",
    "dynamic / static",
    "saved / loaded",
    "stated / stored bytes",
]


def strict_json(text: str) -> object:
    """JSON as every reader accepts it: Python's would let NaN and Infinity pass."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# ---- sizes that cannot work: the same sentences in every command that takes sizes --------------------------------

SIZES = {
    "odd head dim": ("--set mfa.head_dim=15", "mfa", "got 15; use 14"),
    "odd rotary dim": ("--set mha.rotary_dim=3", "mha", "between 2 and 16", "got 3; use 2"),
    "wide rotary dim": ("--set mha.rotary_dim=18", "between 2 and 16, got 18; use 16"),
    "no rotary dim": ("--set mha.rotary_dim=0", "got 0; use 2"),
    "heads and groups": ("--set gqa.num_kv_heads=3", "4 heads", "3 groups", "nearest that does: 2"),
    "no groups": ("--set gqa.num_kv_heads=0", "num_kv_heads must be at least 1, got 0"),
    "rotary blocks": ("--set mfa.rotary_blocks=3", "head_dim 32 cannot be cut into 3 rotary blocks"),
    "C = 0": ("--set mfa.head_dim=0", "mfa: head_dim must be at least 1, got 0"),
    "negative C": ("--set mfa_kr.head_dim=-8", "mfa_kr: head_dim must be at least 1, got -8"),
    "no latent": ("--set mla.latent_dim=0", "mla: latent_dim must be at least 1, got 0"),
    "no heads": ("--set mfa.num_heads=0", "num_heads must be at least 1, got 0"),
    "half a head": ("--set mfa.num_heads=1.5", "num_heads must be a whole number, got 1.5"),
    "a word": ("--set mfa.num_heads=many", "num_heads must be a whole number, got 'many'"),
    "empty value": ("--set mfa.num_heads=", "num_heads must be a whole number, got ''"),
    "a switch": ("--set mfa.query_norm=maybe", "query_norm must be true or false, got 'maybe'"),
    "a scale": ("--set mfa.softmax_scale=abc", "softmax_scale must be a number, got 'abc'"),
    "endless scale": ("--set mfa.softmax_scale=inf", "softmax_scale must be a number, got inf"),
    "negative scale": ("--set mfa.softmax_scale=-1", "softmax_scale must be positive, got -1"),
    "value map": ("--set mfa_kr.value_map=none", "tied, projected, residual or gated, got 'none'"),
    "reading of RoPE": ("--set mfa_kr.key_reuse=both", "unrotated or relative, got 'both'"),
    "unknown size": ("--set mha.query_rank=4", "mha has no size 'query_rank'", "head_dim"),
    "variant as a size": ("--set mfa.variant=mha", "mfa has no size 'variant'"),
    "label not there": ("--set fpba.position=rope", "'fpba'", "not among mha, gqa, mla, mfa, mfa_kr"),
    "no equals sign": ("--set mfa.num_heads", "cannot read 'mfa.num_heads'", "label.field=value"),
    "unknown position": ("--position learned", "rope, alibi or none, got 'learned'"),
    "wide head": ("--head-dim 128", "head_dim must be between 1 and the hidden_size of 64, got 128"),
    "heads that leave a rest": ("--head-dim 12", "heads of 12 do not fill a hidden_size of 64", "nearest that does: 8"),
    "no head dim": ("--head-dim 0", "head_dim must be ", "got 0"),
    "hidden size 0": ("--hidden-size 0", "hidden_size must be at least 1, got 0"),
}
LABELS = {
    "unknown variant": (
        "mfa_kk",
        "no variant 'mfa_kk'",
        "fpba, mha, gqa, mqa, mla, mfa, mfa_kr",
        "did you mean mfa_kr?",
    ),
    "folders in a tag": ("mfa@../../x", "cannot read 'mfa@../../x'", "letters, digits"),
    "empty tag": ("mfa@", "cannot read 'mfa@'"),
}


@pytest.fixture(autouse=True, scope="module")
def no_folder_is_written(tmp_path_factory):
    """Commands that must fail run in an empty folder; `test_nothing_was_written` looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("here")
        patch.chdir(folder)
        yield
        assert list(folder.iterdir()) == []


def assert_one_sentence(words: list, *fragments: str, progress: bool = False) -> None:
    done = multimatrix(*words)
    for fragment in fragments:
        assert fragment in done.sentence
    assert done.err.count("\n") == 1 + progress, done.err
    assert not done.out


@pytest.mark.parametrize("command", ["capacity", "check", "compare"])
@pytest.mark.parametrize(("words", "fragments"), [(w, f) for w, *f in SIZES.values()], ids=SIZES)
def test_sizes_that_cannot_work(command, words, fragments):
    variants = "mha,gqa,mla,mfa,mfa_kr"
    if command == "check":
        label = words.split()[1].partition(".")[0] if words.startswith("--set") else "mha"
        known = label in variants.split(",")
        names = ["--variant", label if known else "mha"]
        fragments = [
            fragment if known else fragment.replace(variants.replace(",", ", "), "mha") for fragment in fragments
        ]
    else:
        names = ["--variants", variants]
    small = ["--hidden-size", 64, "--head-dim", 16]
    assert_one_sentence([command, *names, *small, *words.split()], *fragments)


@pytest.mark.parametrize("words", [["capacity", "--variants"], ["check", "--variant"], ["compare", "--variants"]])
@pytest.mark.parametrize(("label", "fragments"), [(label, f) for label, *f in LABELS.values()], ids=LABELS)
def test_labels_that_mean_nothing(words, label, fragments):
    assert_one_sentence([*words, label], *fragments)


@pytest.mark.parametrize("command", ["capacity", "compare"])
def test_variants_none_and_twice(command):
    assert_one_sentence([command, "--variants", " , "], "no variants were given", "mha,mfa,mfa_kr")
    assert_one_sentence([command, "--variants", "mfa,mha,mfa"], "'mfa' is listed twice", "mfa@name")


def test_the_way_out_of_an_odd_head_works():
    words = ["capacity", "--variants", "mha", "--hidden-size", 49, "--head-dim", 7]
    assert_one_sentence(words, "got 7; use 6")
    assert multimatrix(*words, "--set", "mha.rotary_dim=6").status == 0
    assert multimatrix(*words, "--set", "mha.position=none").status == 0


# ---- capacity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("--recipe paper-8b", ["no recipe 'paper-8b'", "paper-1b, paper-7b, step3"]),
        ("--recipe step3 --set mfa.num_heads=3", ["--recipe has sizes of its own", "--set"]),
        ("--recipe step3 --hidden-size 64", ["--recipe has sizes of its own", "--hidden-size"]),
        ("--recipe step3 --variants mha", ["--recipe has sizes of its own", "--variants"]),
        ("--layers 0", ["number of layers must be at least 1, got 0"]),
        ("--context -1", ["context must be at least 1, got -1"]),
    ],
)
def test_capacity_refuses(words, fragments):
    assert_one_sentence(["capacity", *words.split()], *fragments)


def test_capacity_json():
    words = ["--variants", "mha,mfa_kr@big", "--set", "mfa_kr@big.num_heads=9", "--hidden-size", 64, "--head-dim", 16]
    done = multimatrix("capacity", *words, "--layers", 3, "--context", 100, "--json")
    assert (done.status, done.err) == (0, "")
    mha, big = strict_json(done.out)
    assert (mha["variant"], big["variant"]) == ("mha", "mfa_kr@big")
    assert mha["kv_bytes_per_token"] == 3 * mha["kv_bytes_per_token_per_layer"] == 3 * 2 * 2 * 4 * 16
    assert (mha["num_hidden_layers"], mha["context"], mha["hidden_size"]) == (3, 100, 64)
    for row in (mha, big):
        spec = make_spec(64, row["sizes"])
        assert (row["parameters"], row["heads"]) == (spec.parameters, spec.num_heads)
        assert row["decode_flops_per_token"] == spec.decode_flops(100)
    assert big["heads"] == 9


def test_capacity_table_names_every_variant():
    done = multimatrix("capacity")
    assert done.status == 0
    for variant in VARIANTS:
        assert f"\n{variant} " in done.out


def test_version_and_help():
    from multimatrix import __version__

    assert multimatrix("--version").out == f"multimatrix {__version__}\n"
    for words in ([], ["capacity"], ["check"], ["compare"], ["export"]):
        done = multimatrix(*words, "--help")
        assert done.status == 0
        assert "Usage: multimatrix" in done.out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("compare --steps abc", "--steps"),
        ("compare --learning-rate fast", "--learning-rate"),
        ("capacity --hidden-size 1.5", "--hidden-size"),
        ("capacity --hiden-size 64", "--hiden-size"),
        ("check one two", "two"),
        ("chek", "chek"),
    ],
)
def test_words_that_are_no_command_show_the_usage(words, complaint):
    done = multimatrix(*words.split())
    assert done.status == 2
    assert "Usage: multimatrix" in done.err
    assert complaint in done.err
    assert "Traceback" not in done.err


def test_a_full_disk_behind_the_output():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "multimatrix", "capacity", "--json"],
            env=buffered(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("multimatrix: cannot write the output: No space left on device; make room")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_read_enough():
    command = [sys.executable, "-m", "multimatrix", "capacity", "--json"]
    with subprocess.Popen(
        command, env=buffered(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 1


def buffered() -> dict[str, str]:
    """The environment of a user whose Python buffers its output, as it does by default."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


# ---- check -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("", ["give either the folder of a saved model or --variant NAME"]),
        ("folder --variant mha", ["give either"]),
        ("folder --set mha.num_heads=2", ["a saved model has sizes of its own", "--set"]),
        ("folder --position none", ["a saved model has sizes of its own", "--position"]),
        ("nowhere", ["there is no folder nowhere", "give the folder of a saved model"]),
        ("--variant mha --dtype int8", ["float64, float32, float16, bfloat16", "'int8'"]),
        ("--variant mha --device nvidia", ["device 'nvidia' cannot be used"]),
        ("--variant mha --device meta", ["device 'meta' cannot be used"]),
    ],
)
def test_check_refuses(words, fragments):
    assert_one_sentence(["check", *words.split()], *fragments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model of every variant."""
    folder = tmp_path_factory.mktemp("saved")
    for variant, cls in VARIANTS.items():
        agreement.random_model(cls.sized(16, 4), torch.float32, "cpu").save_pretrained(folder / variant)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_models_agree(saved, variant):
    done = multimatrix("check", saved / variant, "--json")
    assert (done.status, done.err) == (0, "")
    found = strict_json(done.out)
    assert found["subject"] == str(saved / variant)
    assert found["attention"] == VARIANTS[variant].sized(16, 4).to_dict()
    assert (found["dtype"], found["device"], found["passed"]) == ("float32", "cpu", True)
    assert [row["check"] for row in found["checks"]] == CHECKS
    for row in found["checks"]:
        assert set(row) == {"check", "error", "tolerance", "passed", "detail"}
        assert row["passed"] is True
        assert row["error"] <= row["tolerance"]


def break_config(folder: Path, change: dict | None = None, text: str | None = None) -> None:
    path = folder / "config.json"
    path.write_text(text if text is not None else json.dumps(json.loads(path.read_text()) | change))


def drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "cut config": (lambda f: break_config(f, text='{"model_type": "multim'), "JSON"),
    "list for a config": (lambda f: break_config(f, text="[]"), "holds a JSON list, not an object"),
    "another model": (lambda f: break_config(f, {"model_type": "llama"}), "it holds a 'llama' model"),
    "heads and groups": (
        lambda f: break_config(f, {"attention": {"variant": "gqa", "num_heads": 4, "head_dim": 4, "num_kv_heads": 3}}),
        "4 heads cannot be shared by 3 groups",
    ),
    "unknown variant": (lambda f: break_config(f, {"attention": {"variant": "mhaa"}}), "did you mean mha?"),
    "layers and list": (
        lambda f: break_config(f, {"attention": [{"variant": "mha", "num_heads": 4, "head_dim": 4}]}),
        "attention lists 1 layers but num_hidden_layers is 2",
    ),
    "words for sizes": (lambda f: break_config(f, {"hidden_size": "wide"}), "expected int, got str (value: 'wide')"),
    "other sizes": (
        lambda f: break_config(f, {"intermediate_size": 8}),
        "mlp.gate_proj.weight is [32, 16] in model.safetensors and [8, 16] by config.json (5 more tensors",
    ),
    "fewer layers": (
        lambda f: break_config(f, {"num_hidden_layers": 1}),
        "model.layers.1.input_layernorm.weight is [16] in model.safetensors and not in the model of config.json",
    ),
    "unknown field": (lambda f: break_config(f, {"hiden_size": 16}), "'hiden_size'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0{"),
        "its header alone needs 17",
    ),
    "a weight less": (
        drop_a_weight,
        "model.layers.1.self_attn.k_proj.weight is in no file and [16, 16] by config.json;",
    ),
    "few positions": (
        lambda f: break_config(f, {"max_position_embeddings": 8}),
        "12 tokens and the model has 8 positions",
    ),
}


@pytest.mark.parametrize(("damage", "fragment"), DAMAGES.values(), ids=DAMAGES)
def test_check_of_a_damaged_model(saved, tmp_path, damage, fragment):
    folder = tmp_path / "model"
    shutil.copytree(saved / "mha", folder)
    damage(folder)
    assert_one_sentence(["check", folder], fragment, *([] if "positions" in fragment else [str(folder)]))


def test_a_full_disk_under_check(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(modeling.MultimatrixForCausalLM, "save_pretrained", fail)
    assert_one_sentence(["check", "--variant", "mha"], "cannot write", "No space left on device", "make room")


# A saboteur of each check: the bug it is there to find, built in. Each is found by the check of its name.


def turn_twice_as_far(patch):
    at = Rotation.at.__func__

    def wrong(cls, positions, dim, parameters, dtype, blocks=1):
        return at(cls, 2 * positions, dim, parameters, dtype, blocks)

    patch.setattr(Rotation, "at", classmethod(wrong))


def forget_the_value_map(patch):
    patch.setattr(MFAKRSpec, "restore", lambda self, w, o, rope: o)


def restart_positions_in_chunks(patch):
    init = attention_module.RotaryTables.__init__

    def wrong(self, positions, dtype, parameters=None):
        init(self, positions - positions[0] if len(positions) > 1 else positions, dtype, parameters)

    patch.setattr(attention_module.RotaryTables, "__init__", wrong)


def mix_the_batch(patch):
    forward = SwiGLU.forward
    patch.setattr(SwiGLU, "forward", lambda self, x: forward(self, x + 0.1 * x.mean(0, keepdim=True)))


def ignore_the_padding(patch):
    create = modeling.create_causal_mask
    patch.setattr(modeling, "create_causal_mask", lambda **words: create(**words | {"attention_mask": None}))


def spoil_the_static_cache(patch):
    update = StaticLayer.update

    def wrong(self, key, value, *args, **kwargs):
        return update(self, 1.1 * key, value, *args, **kwargs)

    patch.setattr(StaticLayer, "update", wrong)


def save_half_of_the_bits(patch):
    save = modeling.MultimatrixForCausalLM.save_pretrained

    def wrong(self, folder):
        save(self, folder, state_dict={name: t.bfloat16().float() for name, t in self.state_dict().items()})

    patch.setattr(modeling.MultimatrixForCausalLM, "save_pretrained", wrong)


def store_the_key_twice(patch):
    """What code bases do that advertise a small cache."""
    store = attention_module._store

    def wrong(cache, latents: tuple[Tensor, ...], layer_idx):
        return store(cache, (latents[0], latents[0].clone()), layer_idx)[:1]

    patch.setattr(attention_module, "_store", wrong)


def state_less_than_is_stored(patch):
    vectors = CacheLayout.vectors.fget
    patch.setattr(CacheLayout, "vectors", property(lambda self: tuple((n, dim - 1) for n, dim in vectors(self))))


SABOTAGES = [
    (turn_twice_as_far, "oracle"),
    (forget_the_value_map, "training / decoding"),
    (restart_positions_in_chunks, "prefill / chunked"),
    (mix_the_batch, "batch / single"),
    (ignore_the_padding, "padded / not"),
    (spoil_the_static_cache, "dynamic / static"),
    (save_half_of_the_bits, "saved / loaded"),
    (store_the_key_twice, "stated / stored bytes"),
    (state_less_than_is_stored, "stated / stored bytes"),
]
# Bugs that no other check can see.
SEEN_BY_ONE = {turn_twice_as_far, ignore_the_padding, spoil_the_static_cache, save_half_of_the_bits} | {
    store_the_key_twice,
    state_less_than_is_stored,
}


def test_every_check_has_a_saboteur():
    assert {name for _, name in SABOTAGES} == set(CHECKS)
    assert len(agreement.CHECKS) == len(CHECKS)


@pytest.mark.parametrize(("sabotage", "name"), SABOTAGES, ids=lambda case: getattr(case, "__name__", None))
def test_check_fails(monkeypatch, sabotage, name):
    sabotage(monkeypatch)
    done = multimatrix("check", "--variant", "mfa_kr", "--json")
    assert done.status == 1
    found = strict_json(done.out)
    failed = [row["check"] for row in found["checks"] if not row["passed"]]
    assert name in failed
    assert failed == [name] or sabotage not in SEEN_BY_ONE
    assert found["passed"] is False
    assert done.err == f"multimatrix: {len(failed)} of 8 checks failed: {', '.join(failed)}\n"


def test_a_failed_check_is_printed_as_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    spoil_the_static_cache(monkeypatch)
    done = multimatrix("check", "--variant", "mfa_kr")
    assert done.status == 1
    assert done.out.count("DISAGREES") == 1
    assert next(line for line in done.out.splitlines() if "DISAGREES" in line).startswith("dynamic / static")
    assert done.out.count("agrees") == 7


def test_nan_is_a_failure_and_the_json_stays_json(monkeypatch):
    monkeypatch.setattr(agreement, "_relative", lambda actual, expected: float("nan"))
    done = multimatrix("check", "--variant", "mha", "--json")
    assert done.status == 1
    found = strict_json(done.out)
    assert [row["passed"] for row in found["checks"]] == [False] * 7 + [True]
    assert found["checks"][0]["error"] is None


# ---- compare: settings and text ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files a user may name by mistake, and one good one of some 5,000 tokens, 4,500 of them to train on."""
    folder = tmp_path_factory.mktemp("texts")
    shuffle = random.Random(0)
    words = ["the", "fox", "and", "hen", "sat", "by", "old", "red", "barn", "while", "rain", "fell", "on", "hill"]
    rows = [{"text": " ".join(shuffle.choices(words, k=50))} for _ in range(25)]
    (folder / "good.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "one.txt").write_text("one document is one document " * 100)
    (folder / "twins.jsonl").write_text('{"text": "the same"}\n{"text": "the same"}\n')
    (folder / "short.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n')
    (folder / "empty.txt").write_text("")
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"whole" * 1000)[:20])
    (folder / "folder").mkdir()
    return folder


SMALL = (
    "--variants mha,mfa_kr --seeds 0 --hidden-size 32 --head-dim 8 --layers 1 --context 32 --steps 4 --batch-size 2 "
    "--evaluations 1"
)
SETTINGS = [
    ("--preset demmo", ["no preset 'demmo'", "demo"]),
    ("--seeds ,", ["no seeds were given", "--seeds 0,1"]),
    ("--seeds 0,one", ["--seeds takes whole numbers", "'0,one'"]),
    ("--seeds 1,1", ["different whole numbers", "got 1, 1"]),
    ("--seeds -1", ["from 0 to 4294967295, got -1"]),
    ("--seeds 4294967296", ["from 0 to 4294967295, got 4294967296"]),
    ("--context 64 --max-positions 32", ["context of 64", "32 positions", "--max-positions to 64"]),
    ("--context 1", ["context must be at least 2, got 1"]),
    ("--max-positions 0", ["max_position_embeddings must be at least 1, got 0"]),
    ("--steps 0", ["steps must be at least 1, got 0"]),
    ("--layers 0", ["num_hidden_layers must be at least 1, got 0"]),
    ("--batch-size 0", ["batch_size must be at least 1, got 0"]),
    ("--evaluations 5", ["5 evaluations", "4 steps", "lower --evaluations to at most 4"]),
    ("--validation-tokens 0", ["validation_tokens must be at least 1, got 0"]),
    ("--learning-rate 0", ["learning_rate must be a positive number, got 0.0"]),
    ("--learning-rate inf", ["learning_rate must be a positive number, got inf"]),
    ("--rope-theta nan", ["rope_theta must be a positive number, got nan"]),
    ("--weight-decay -0.1", ["weight_decay must be a number from 0 on, got -0.1"]),
    ("--warmup-fraction 1", ["warmup_fraction must be from 0 to below 1, got 1.0"]),
    ("--match flops", ["parameters or none, got 'flops'"]),
    ("--precision int8", ["auto, float32 or bfloat16, got 'int8'"]),
    ("--intermediate-size 1", ["mfa_kr has 12,688 parameters", "none of the 12,512", "--match none"]),
    ("--set mfa_kr.head_dim=512", ["without a feed-forward", "fewer or narrower heads"]),
]
TEXTS = [
    ("--data good.jsonl --validation-fraction 0.9", ["above 0 and at most 0.5, got 0.9"]),
    ("--data nowhere.txt", ["nowhere.txt does not exist", "hub:owner/name"]),
    ("--data one.txt", ["a validation split needs at least 2 documents, got 1", "split the text"]),
    ("--data twins.jsonl", ["at least 2 documents, got 1 (1 more had the same text)"]),
    ("--data short.jsonl", ["the train text has 3 tokens and one block needs 32", "at most 3 or add text"]),
    ("--data good.jsonl --context 5000", ["one block needs 5000; set context to at most"]),
    (
        "--data good.jsonl --batch-size 500",
        ["blocks of 32 tokens and one step needs 500; set the batch size to at most"],
    ),
    ("--data empty.txt", ["empty.txt holds no text"]),
    ("--data blank.jsonl", ["blank.jsonl holds no text"]),
    ("--data broken.jsonl", ["row 2 of", "is not JSON"]),
    ("--data latin.txt", ["latin.txt is not UTF-8 at byte 3"]),
    ("--data photo.jpg", ["photo.jpg is of no supported kind", ".jsonl"]),
    ("--data cut.txt.gz", ["cut.txt.gz is damaged or cut short"]),
    ("--data folder", ["folder holds no supported file"]),
    ("--data good.jsonl::body", ["no field 'body'; it has text"]),
    ("--data good.jsonl --tokenizer ./nowhere", ["./nowhere does not exist"]),
    ("--data good.jsonl --tokenizer bpe:64", ["bpe:64", "at least 257"]),
    ("--data good.jsonl --tokenizer bpe:9999", ["asks for 9999 entries and the train text yields", "or add text"]),
]


@pytest.mark.parametrize(("words", "fragments"), SETTINGS, ids=[words for words, _ in SETTINGS])
def test_compare_refuses_settings_before_it_reads(texts, words, fragments):
    assert_one_sentence(["compare", "--data", texts / "good.jsonl", *SMALL.split(), *words.split()], *fragments)


@pytest.mark.parametrize(("words", "fragments"), TEXTS, ids=[words for words, _ in TEXTS])
def test_compare_refuses_text(texts, words, fragments):
    words = [
        texts / word if word.partition("::")[0] in {f.name for f in texts.iterdir()} else word for word in words.split()
    ]
    words = [f"{word.parent / word.name}" if isinstance(word, Path) else word for word in words]
    assert_one_sentence(["compare", *SMALL.split(), *words], *fragments, progress=True)


def test_compare_refuses_a_source_without_a_name():
    # As from --data "$TEXT" where TEXT is not set; the current folder must not be read.
    assert_one_sentence(["compare", "--data", ""], "a source of text has no name")


def test_a_dry_run_prints_the_matched_sizes(texts):
    done = multimatrix("compare", "--data", texts / "good.jsonl", *SMALL.split(), "--dry-run")
    assert (done.status, done.err) == (0, "reading the text\n")
    assert "25 documents" in done.out
    rows = [line.split() for line in done.out.splitlines() if line.startswith(("mha ", "mfa_kr "))]
    assert [row[0] for row in rows] == ["mha", "mfa_kr"]
    assert rows[1][-2:] == ["25.0", "%"]
