"""A checkpoint that carries its code, in processes where multimatrix cannot be imported and where it can."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import multimatrix as multimatrix_package
from cases import DECODERS, padded, random_ids, random_model
from command import multimatrix
from multimatrix import InputError, MultimatrixConfig, MultimatrixForCausalLM, __version__
from multimatrix.data.tokenizer import load_tokenizer
from multimatrix.model.loading import load_model
from multimatrix.model.portable import flat_modules, flat_name, flatten

# What a process without the package does with every folder it is given. The package is installed beside the tests, so
# its import is blocked.
STRANGER = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("multimatrix", "wrapt", "typer"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocked())
try:
    import multimatrix
except ImportError:
    pass
else:
    raise SystemExit("multimatrix is installed in the process that must not have it")

from pathlib import Path
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
from transformers.utils import logging

logging.disable_progress_bar()
root, threads = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
ids, mask = torch.load(root / "input.pt")

def load(auto, folder):
    model = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # mapped weights lie at any address, and the last bit depends on it
    return model

for folder in sorted(root.glob("*/portable")):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules."), type(config)
    assert config.provenance == {"seed": 3}
    model = load(AutoModelForCausalLM, folder)
    words = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=mask)
    found = {
        "logits": model(ids, attention_mask=mask).logits,
        "hidden": load(AutoModel, folder)(ids, attention_mask=mask).last_hidden_state,
        "dynamic": model.generate(ids, **words),
        "static": model.generate(ids, cache_implementation="static", **words),
    }
    model.save_pretrained(folder.parent / "again")
    again = load(AutoModelForCausalLM, folder.parent / "again")
    found["again"] = again(ids, attention_mask=mask).logits
    torch.save(found, folder.parent / "found.pt")

text = pipeline("text-generation", model=str(root / "with-tokenizer"), trust_remote_code=True)
print(text("ab", max_new_tokens=4, do_sample=False)[0]["generated_text"])
"""


def run_elsewhere(root: Path, code: str, **variables: str) -> str:
    """What a process in `root`, with a cache of modules of its own and nothing on its path, prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), str(torch.get_num_threads())],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def travelled(tmp_path_factory):
    """A folder a decoder, and what the stranger found there: (root, decoder -> what this process computes)."""
    root = tmp_path_factory.mktemp("travelled")
    torch.manual_seed(0)
    ids, mask = padded([random_ids(9), random_ids(5)])
    torch.save((ids, mask), root / "input.pt")
    expected = {}
    for name, specs in DECODERS.items():
        model = random_model(specs, tie_word_embeddings=name == "hybrid")
        model.config.provenance = {"seed": 3}
        model.save_pretrained(root / name / "portable", include_code=True)
        words = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
        with torch.no_grad():
            expected[name] = {
                "logits": model(ids, attention_mask=mask).logits,
                "hidden": model.model(ids, attention_mask=mask).last_hidden_state,
                "dynamic": model.generate(ids, **words),
                "static": model.generate(ids, cache_implementation="static", **words),
            }
            expected[name]["again"] = expected[name]["logits"]
    tokenizer = load_tokenizer("bytes", [])
    random_model(DECODERS["mfa_kr"], torch.float32, vocab_size=len(tokenizer)).save_pretrained(root / "source")
    tokenizer.save_pretrained(root / "source")
    assert multimatrix("export", root / "source", root / "with-tokenizer", "--no-check").status == 0
    printed = run_elsewhere(root, STRANGER)
    return root, expected, printed


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("what", ["logits", "hidden", "dynamic", "static", "again"])
def test_a_stranger_computes_the_same_to_the_bit(travelled, name, what):
    root, expected, _ = travelled
    found = torch.load(root / name / "found.pt")
    assert torch.equal(found[what], expected[name][what])


def test_a_stranger_runs_the_pipeline(travelled):
    _, _, printed = travelled
    assert re.fullmatch(r"ab.+", printed.removesuffix("\n"), re.S)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("folder", ["portable", "again"])
def test_here_the_installed_classes_load_it(travelled, name, folder):
    """With trust and without, the code that is imported wins over the code in the folder."""
    root, expected, _ = travelled
    ids, mask = torch.load(root / "input.pt")
    for trust in (None, True):
        config = AutoConfig.from_pretrained(root / name / folder, trust_remote_code=trust)
        assert type(config) is MultimatrixConfig
        model = AutoModelForCausalLM.from_pretrained(root / name / folder, trust_remote_code=trust)
        assert type(model) is MultimatrixForCausalLM
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        assert torch.equal(model(ids, attention_mask=mask).logits, expected[name]["logits"])
    assert load_model(root / name / folder).config.layer_specs() == DECODERS[name]
    assert (root / name / folder / "README.md").read_text().count("trust_remote_code=True") == 1


def test_installed_and_imported_only_later(travelled):
    """A process that has the package but did not import it runs the folder's code, and may import ours afterwards."""
    root, _, _ = travelled
    found = run_elsewhere(
        root,
        f"""
import torch
from transformers import AutoModelForCausalLM
folder = {str(root / "mfa_kr" / "portable")!r}
theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
from multimatrix import MultimatrixForCausalLM
ours = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(theirs).__module__.startswith("transformers_modules."), type(theirs)
assert type(ours) is MultimatrixForCausalLM
ids, mask = torch.load({str(root / "input.pt")!r})
for model in (theirs, ours):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
print(torch.equal(theirs(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits))
""",
        PYTHONPATH=str(Path(multimatrix_package.__file__).parent.parent),
    )
    assert found == "True\n"


def test_without_trust_nothing_is_run(travelled, monkeypatch):
    """The message is transformers' own: what is tested is that our folder asks for trust."""
    root, _, _ = travelled
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "multimatrix")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(root / "mfa" / "portable", trust_remote_code=False)


# ---- the code that is written ------------------------------------------------------------------------------------


def test_written_code_is_what_transformers_follows(travelled):
    root, _, _ = travelled
    folder = root / "mfa" / "portable"
    files = {path.stem for path in folder.glob("*.py")}
    assert {"configuration_multimatrix", "modeling_multimatrix", "multimatrix_attention_gmha"} <= files
    needed = {"torch", "transformers", "huggingface_hub", "numpy", *sys.stdlib_module_names}
    reached, waiting = set(), ["configuration_multimatrix", "modeling_multimatrix"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += get_relative_imports(folder / f"{name}.py")
            assert set(get_imports(folder / f"{name}.py")) <= needed
    assert reached == files
    for path in folder.glob("*.py"):
        first, second, *_ = path.read_text().splitlines()
        assert re.fullmatch(
            rf"# multimatrix\.\S+ of multimatrix {__version__}, commit ([0-9a-f]{{40}}(\+changes)?|unknown)\.", first
        )
        assert second == "# SPDX-License-Identifier: Apache-2.0"


def test_flat_code_differs_from_ours_in_imports_alone():
    for module, flat in flat_modules().items():
        __import__(module)
        trees = []
        for source in (Path(sys.modules[module].__file__).read_text(encoding="utf-8"), flat):
            trees.append(ast.parse(source))
            for node in ast.walk(trees[-1]):
                if isinstance(node, ast.ImportFrom):
                    node.module, node.level = flat_name(node.module), 0
        assert ast.dump(trees[0]) == ast.dump(trees[1]), module


REWRITTEN = {
    "plain": ("from multimatrix.errors import InputError", "from .multimatrix_errors import InputError"),
    "between semicolons": (
        "x = 1; from multimatrix.errors import one_line as o; y = 2",
        "x = 1; from .multimatrix_errors import one_line as o; y = 2",
    ),
    "behind umlauts": (
        "s = 'ä'; from multimatrix.errors import InputError",
        "s = 'ä'; from .multimatrix_errors import InputError",
    ),
    "several lines": (
        "from multimatrix.attention import (\n    VARIANTS,  # why\n    make_spec,\n)\nx = 1",
        "from .multimatrix_attention import VARIANTS, make_spec\nx = 1",
    ),
    "continued line": (
        "from multimatrix.errors \\\n  import InputError\nx = 1",
        "from .multimatrix_errors import InputError\nx = 1",
    ),
    "in a function": (
        "def f():\n    from multimatrix.ops.alibi import alibi_bias\n",
        "def f():\n    from .multimatrix_ops_alibi import alibi_bias\n",
    ),
    "under a condition": (
        "if TYPE_CHECKING:\n\tfrom multimatrix.model.configuration import MultimatrixConfig",
        "if TYPE_CHECKING:\n\tfrom .configuration_multimatrix import MultimatrixConfig",
    ),
    "two on a page": (
        "from multimatrix.errors import InputError\nimport os\nfrom multimatrix.ops.alibi import alibi_bias",
        "from .multimatrix_errors import InputError\nimport os\nfrom .multimatrix_ops_alibi import alibi_bias",
    ),
    "relative": ("from .gmha import AttentionSpec", "from .multimatrix_attention_gmha import AttentionSpec"),
    "relative to the package": ("from ..errors import InputError", "from .multimatrix_errors import InputError"),
    "somebody else's": ("from multimatrix_other import x\nimport torch, ast as a\nfrom torch import nn", None),
    "in a text": ("s = 'from multimatrix.errors import InputError'", None),
}


@pytest.mark.parametrize(("source", "expected"), REWRITTEN.values(), ids=REWRITTEN)
def test_imports_are_rewritten(source, expected):
    found, _ = flatten("multimatrix.attention.mha", source)
    assert found == (source if expected is None else expected)


def test_imported_modules_are_listed():
    source = "from multimatrix.errors import InputError\ndef f():\n    from multimatrix.ops.alibi import alibi_bias"
    assert sorted(flatten("multimatrix.attention.mha", source)[1]) == ["multimatrix.errors", "multimatrix.ops.alibi"]


@pytest.mark.parametrize(
    "source",
    [
        "import multimatrix",
        "import os, multimatrix.errors as e",
        "from multimatrix import make_spec",
        "from multimatrix.attention import gmha",
        "from . import gmha",
    ],
)
def test_imports_that_cannot_be_rewritten_are_bugs(source):
    with pytest.raises(AssertionError, match=r"multimatrix\.attention\.mha, line 1: import"):
        flatten("multimatrix.attention.mha", source)


# ---- saving ------------------------------------------------------------------------------------------------------


def test_code_is_written_only_on_request(tmp_path):
    model = random_model(DECODERS["mfa"], torch.float32)
    model.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    model.save_pretrained(tmp_path / "code", include_code=True)
    loaded = load_model(tmp_path / "code")
    loaded.save_pretrained(tmp_path / "plain-again")
    assert "auto_map" not in json.loads((tmp_path / "plain-again" / "config.json").read_text())
    with pytest.raises(InputError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "pushed", include_code=True, push_to_hub=True)
    assert not (tmp_path / "pushed").exists()


def test_base_model_travels_as_well(tmp_path):
    model = random_model(DECODERS["mfa"], torch.float32).model
    model.save_pretrained(tmp_path, include_code=True)
    ids = random_ids(1, 5)
    loaded = AutoModel.from_pretrained(tmp_path)
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)
