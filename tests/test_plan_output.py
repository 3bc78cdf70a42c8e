"""What the command prints and refuses, and its page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cases import DECODERS, small_config
from command import multimatrix
from multimatrix.plan import tables
from multimatrix.plan.answer import Question, answer
from multimatrix.plan.hardware import find_hardware
from multimatrix.plan.sources import from_recipe

ROOT = Path(__file__).parent.parent
# ---- the command -----------------------------------------------------------------------------------------------------


def test_replacements_are_columns_beside_the_model(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    words = ("--recipe", "step3", "--replace", "mfa_kr", "--equal", "parameters,cache", "--gpu", "h800")
    rows = json.loads(multimatrix("plan", *words, "--json").out)
    assert [row["model"] for row in rows] == ["step3", "step3 with mfa_kr", "step3 with mfa_kr, equal cache"]
    assert rows[1]["kv_bytes_per_token"] * 2 == rows[0]["kv_bytes_per_token"] == rows[2]["kv_bytes_per_token"]
    wide = json.loads(multimatrix("plan", *words, "--set", "mfa_kr.head_dim=512", "--json").out)
    assert wide[1]["kv_bytes_per_token"] == rows[0]["kv_bytes_per_token"]
    assert "step3 with mfa_kr" in multimatrix("plan", *words).out


def test_own_numbers_and_layouts(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = ("--variants", "mfa", "--memory", "80GB", "--bandwidth", "3.2TB", "--flops", "989T", "--batch", "1,4")
    row = json.loads(multimatrix("plan", *words, "--tensor-parallel", 2, "--page-size", 64, "--json").out)
    (chip,) = row["hardware"]
    assert (chip["hardware"], chip["devices"], chip["dollars_per_hour"]) == ("own", 2, None)
    assert [made["batch"] for made in chip["predictions"]] == [1, 4, chip["largest_batch"]]
    assert chip["predictions"][0]["core_seconds"] == pytest.approx(8192 * 24 * 2 * 256 * 2 / 3.2e12)
    out = " ".join(multimatrix("plan", *words, "--tensor-parallel", 2).out.split())
    for text in (
        "on 2 devices",
        "One of 2 devices holds",
        "a single one to every device",
        "2 (T2)",
        "10 % of the memory",
    ):
        assert text in out
    both = json.loads(multimatrix("plan", *words, "--gpu", "h20", "--price", "3", "--json").out)
    assert [chip["hardware"] for chip in both["hardware"]] == ["h20", "own"]


def test_what_the_docs_show_of_parallelism_is_what_the_command_prints(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    words = (
        "--recipe qwen3-32b --replace mfa --replace mfa_kr --gpu h200 --context 128k --kv-bits 8 --tensor-parallel 8"
    )
    out = "\n".join(line.rstrip() for line in multimatrix("plan", *words.split()).out.splitlines())
    shown = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    assert out.endswith(shown.rstrip())
    assert "on 8 devices" in shown


def test_the_table_of_the_docs_is_what_the_command_prints(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    recipes = "step3,deepseek-v3,kimi-k2,qwen3-235b-a22b,qwen3-32b"
    done = multimatrix("plan", "--recipe", recipes, "--context", "8192", "--kv-bits", "8", "--gpu", "h800,h20")
    shown = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8").split("```text\n")[2].split("```")[0]
    assert [line.rstrip() for line in done.out.splitlines()] == shown.splitlines()


WIDE = (
    ("--recipe", "step3,deepseek-v3,kimi-k2,qwen3-235b-a22b,qwen3-32b", "--kv-bits", 8, "--gpu", "h800"),
    ("--recipe", "qwen3-235b-a22b", "--replace", "mfa", "--gpu", "h200", "--tensor-parallel", 8),
    ("--recipe", "qwen3-235b-a22b", "--target-kv", "10%", "--gpu", "h200", "--batch", 8),
)


@pytest.mark.parametrize("words", WIDE, ids=["models", "devices", "search"])
def test_eighty_columns_break_no_number_and_no_word(words, monkeypatch):
    cells = []
    for columns in ("200", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        out = multimatrix("plan", *words).out
        assert max(map(len, out.splitlines())) <= int(columns)
        cells.append(set(out.split()))
    wide, narrow = cells
    assert {cell for cell in wide - narrow if not cell.startswith("qwen3-")} == set()
    assert {cell for cell in narrow - wide if not re.fullmatch(r"qwen3-|235b-|a22b|32b", cell)} == set()


ROW = """
model source unread_fields hidden_size num_hidden_layers layers parameters active_parameters parameters_by_part kv_bits
kv_bytes_per_token kv_bytes_per_token_by_bits kv_scale_bytes_per_token_by_bits context kv_bytes kv_scale_bytes page_size
kv_stored_bytes attention_core_flops linear_flops feed_forward_flops router_flops output_head_flops flops
arithmetic_intensity total_effective_rank shared_latent_dim weight_bits prefill_flops forms hardware per_device search
"""
CHIP_ROW = """
hardware title memory_bytes bytes_per_second dollars_per_hour roofline bound attention_dollars other_dollars
flops_per_second devices layout weight_bytes_per_device workspace_bytes_per_device cache_bytes_per_device
kv_bytes_per_sequence_per_device largest_batch prefill_seconds prefill_bound forms predictions
"""
PREDICTION = """
batch context fits seconds_per_token tokens_per_second dollars_per_million_tokens bound core_bound linear_bound
rest_bound core_seconds linear_seconds rest_seconds longest_context devices_needed
"""


def test_the_shape_of_json_is_stable():
    words = ("--recipe", "step3", "--gpu", "h20", "--target-kv", "50%")
    row = json.loads(multimatrix("plan", *words, "--json").out)
    (chip,) = row["hardware"]
    for made, names in ((row, ROW), (chip, CHIP_ROW), (chip["predictions"][0], PREDICTION)):
        assert list(made) == names.split()


def test_the_core_waits_for_the_same_in_both_tables():
    """At 16 bit an H20 has half its peak of 8 bit: MFA's core waits for arithmetic, as the roofline has it."""
    words = ("--recipe", "step3", "--gpu", "h20", "--attention-data-parallel", 16)
    for bits, roofline in ((16, 37), (8, 74)):
        row = json.loads(multimatrix("plan", *words, "--kv-bits", bits, "--json").out)
        (chip,) = row["hardware"]
        assert chip["roofline"] == pytest.approx(roofline, abs=0.1)
        assert chip["bound"] == chip["predictions"][0]["core_bound"] == "arithmetic"


def test_models_of_one_name_are_told_apart(tmp_path, monkeypatch):
    for seed, variant in enumerate(("mha", "mfa")):
        small_config(DECODERS[variant]).save_pretrained(tmp_path / f"seed{seed}" / "model[/x]")
    monkeypatch.chdir(tmp_path)
    words = ("seed0/model[/x]", "seed1/model[/x]", "seed0/model[/x]")
    words += ("--recipe", "step3,step3", "--gpu", "h20,h20")
    rows = json.loads(multimatrix("plan", *words, "--json").out)
    assert [row["model"] for row in rows] == ["step3", "seed0/model[/x]", "seed1/model[/x]"]
    assert "seed1/model[/x]" in multimatrix("plan", *words).out
    assert [chip["hardware"] for chip in rows[0]["hardware"]] == ["h20"]


def test_a_replacement_is_not_searched_itself():
    words = ("--recipe", "qwen3-32b", "--replace", "mfa", "--target-kv", "10%", "--gpu", "")
    own, replaced = json.loads(multimatrix("plan", *words, "--json").out)
    assert own["search"]["found"]
    assert "search" not in replaced


def test_what_does_not_fit_says_what_would():
    words = ("--recipe", "step3", "--gpu", "h800", "--tensor-parallel", 4)
    (made,) = json.loads(multimatrix("plan", *words, "--json").out)["hardware"][0]["predictions"]
    assert not made["fits"]
    assert (made["devices_needed"], made["seconds_per_token"], made["longest_context"]) == (16, None, 0)
    assert "needs 16" in multimatrix("plan", *words).out
    assert "MFA-KR fits; take more" in " ".join(multimatrix("plan", *words, "--batch", 1).out.split())
    small = ("--recipe", "step3", "--memory", "1GB", "--bandwidth", "1TB", "--flops", "1T")
    assert "fits nowhere" in multimatrix("plan", *small).out


BAD_WORDS = {
    "recipe": (("--recipe", "step4"), "step3"),
    "no-recipe": (("--recipe", ","), "--recipe"),
    "beside": (("--recipe", "step3", "--layers", 3), "--layers"),
    "context": (("--context", "0"), "context"),
    "contexts": (("--context", "8q"), "8q"),
    "no-context": (("--context", ","), "--context"),
    "bits": (("--kv-bits", 3), "16, 8 or 4"),
    "layers": (("--layers", 0), "--layers"),
    "vocabulary": (("--vocab-size", -1), "vocab_size"),
    "width": (("--intermediate-size", 0), "intermediate_size"),
    "head-dim": (("--head-dim", 100), "100"),
    "batch": (("--batch", 0), "--batch must be at least 1, got 0"),
    "batches": (("--batch", "many"), "many"),
    "negative": (("--context", "-8k"), "-8k"),
    "fraction": (("--context", "1.0001k"), "1.0001k"),
    "workspace": (("--workspace", "100%"), "100 %"),
    "workspace-text": (("--workspace", "some"), "some"),
    "efficiency": (("--efficiency", "0%"), "0 %"),
    "efficiency-much": (("--efficiency", "120%"), "120%"),
    "weight-bits": (("--weight-bits", 2), "16, 8 or 4"),
    "page": (("--page-size", 0), "page"),
    "tensor": (("--tensor-parallel", 0), "tensor"),
    "heads": (("--recipe", "step3", "--tensor-parallel", 7), "64 heads"),
    "key-heads": (("--variants", "gqa", "--hidden-size", 1536, "--tensor-parallel", 2), "3 key heads"),
    "gpu": (("--gpu", "h9000"), "h800"),
    "own": (("--flops", "1T"), "--memory, --bandwidth beside --flops"),
    "own-number": (("--flops", "fast", "--memory", "1GB", "--bandwidth", "1TB"), "fast"),
    "replace": (("--recipe", "step3", "--replace", "mla"), "mfa or mfa_kr"),
    "equal": (("--recipe", "step3", "--replace", "mfa", "--equal", "speed"), "speed"),
    "equal-alone": (("--recipe", "step3", "--equal", "cache"), "--replace"),
    "set-alone": (("--recipe", "step3", "--set", "mfa.head_dim=64"), "--replace"),
    "set-other": (("--recipe", "step3", "--replace", "mfa", "--set", "mla.latent_dim=64"), "mla"),
    "set-field": (("--recipe", "step3", "--replace", "mfa", "--set", "mfa.width=64"), "width"),
    "no-head": (("--recipe", "qwen3-32b", "--replace", "mfa", "--set", "mfa.head_dim=9000"), "head_dim"),
    "target": (("--recipe", "step3", "--target-kv", "most"), "most"),
    "target-nothing": (("--recipe", "step3", "--target-kv", "0"), "above 0 %"),
    "html": (("--html", "."), "folder"),
}


@pytest.mark.parametrize(("words", "word"), BAD_WORDS.values(), ids=BAD_WORDS)
def test_bad_options_are_refused(words, word):
    assert word in multimatrix("plan", *words).sentence


def test_plans_without_a_page_load_no_matplotlib():
    code = (
        "import sys; sys.argv = 'multimatrix plan --recipe qwen3-32b --target-kv 10% --batch 8 --gpu h200'.split()\n"
        "from multimatrix.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('matplotlib', 'numpy', 'torch', 'jinja2') if m in sys.modules], file=sys.stderr)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == "[]\n"


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page")
    small_config(DECODERS["mla"]).save_pretrained(folder / "model <b>")
    words = (folder / "model <b>", "--recipe", "step3,deepseek-v3", "--gpu", "h800", "--target-kv", "50%")
    file = folder / "new" / "plan.html"
    done = multimatrix("plan", *words, "--context", "8k,64k", "--html", file)
    assert done.status == 0
    assert f"wrote {file}" in done.out
    assert list(file.parent.iterdir()) == [file]
    return file.read_text(encoding="utf-8")


def test_the_page_is_self_contained(page):
    assert page.count("<svg") == 4
    assert "<script" not in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!#)""", re.sub(r'xlink:href="#', "", page))
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert "model &lt;b&gt;" in page
    assert "model <b>" not in page


def test_the_page_has_the_tables_of_the_terminal(page):
    text = re.sub(r"<[^>]+>", " ", page)
    row = answer(from_recipe("deepseek-v3"), 8192, Question(chips=tuple(find_hardware(["h800"]))))
    made = [cell.text for line in tables.serving_table([row], 0).lines for cell in line.cells[1:]]
    made += [cell.text for line in tables.form_table([row]).lines for cell in line.cells[1:]]
    assert len(made) > 30
    for cell in made:
        assert f" {cell} " in text
    assert "on 32 devices" in text
    assert "10 % of every device" in text


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "plan.html"
    file.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("os.replace", full)
    assert "No space" in multimatrix("plan", "--recipe", "step3", "--gpu", "h800", "--html", file).sentence
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]
    assert file.read_text() == "old"
