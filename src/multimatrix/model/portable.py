"""The code of a model as flat files beside its weights, for a process where multimatrix is not installed.

transformers runs such files with `trust_remote_code=True`. It copies the file that `auto_map` names and what that
imports relatively, from one folder; our modules lie in several packages and import each other by their full names. So
every module that the configuration and the model import, directly or not, is written as one file of its own, and its
imports are rewritten: `from multimatrix.attention.gmha import X` becomes `from .multimatrix_attention_gmha import X`.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from multimatrix import __version__
from multimatrix.environment import commit
from multimatrix.files import write_text

PACKAGE = "multimatrix"
# transformers' names for the two files that it is pointed at.
ENTRIES = {
    "multimatrix.model.configuration": "configuration_multimatrix",
    "multimatrix.model.modeling": "modeling_multimatrix",
}
AUTO_MAP = {
    "AutoConfig": "configuration_multimatrix.MultimatrixConfig",
    "AutoModel": "modeling_multimatrix.MultimatrixModel",
    "AutoModelForCausalLM": "modeling_multimatrix.MultimatrixForCausalLM",
}


def write_code(folder: Path) -> None:
    """Write the model's code to `folder`, one flat file a module.

    Raises:
        OSError: the folder cannot be written.
    """
    origin = f"multimatrix {__version__}, commit {commit() or 'unknown'}"
    for module, source in flat_modules().items():
        header = f"# {module} of {origin}.\n# SPDX-License-Identifier: Apache-2.0\n"
        write_text(folder / f"{flat_name(module)}.py", header + source)


def flat_modules() -> dict[str, str]:
    """Module name -> source with relative imports, for the entries and all of ours that they import."""
    sources: dict[str, str] = {}
    waiting = list(ENTRIES)
    while waiting:
        module = waiting.pop()
        if module not in sources:
            sources[module], imported = flatten(module, _source(module))
            waiting.extend(imported)
    assert len({flat_name(module) for module in sources}) == len(sources), f"two of {sorted(sources)} share a file"
    return sources


def flat_name(module: str) -> str:
    """`multimatrix.attention.gmha` -> `multimatrix_attention_gmha`; the entries have the names transformers gives."""
    return ENTRIES.get(module, module.replace(".", "_"))


def flatten(module: str, source: str) -> tuple[str, list[str]]:
    """`source` of `module` with its imports of ours made relative, and the modules that they name.

    Imports in functions and under TYPE_CHECKING count: transformers wants the file of every relative import. An import
    that binds a module has no relative form that transformers follows, and one of the package itself would bring all
    of it along; both are bugs in `module`.
    """
    imported: list[str] = []
    replacements: list[tuple[int, int, str]] = []
    text = source.encode()  # columns of the syntax tree count bytes
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in ast.walk(ast.parse(source)):
        where = f"{module}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not any(_is_ours(alias.name) for alias in node.names), f"{where}: import names, not a module"
        if not isinstance(node, ast.ImportFrom):
            continue
        target = node.module or ""
        if node.level:
            package = module if _is_package(module) else module.rpartition(".")[0]
            target = importlib.util.resolve_name("." * node.level + target, package)
        if not _is_ours(target):
            continue
        assert target != PACKAGE, f"{where}: import from the module that defines the name, not from {PACKAGE}"
        for alias in node.names:
            is_module = _is_package(target) and importlib.util.find_spec(f"{target}.{alias.name}") is not None
            assert not is_module, f"{where}: import the names of {target}.{alias.name}, not the module"
        imported.append(target)
        start = starts[node.lineno - 1] + node.col_offset
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        end = starts[node.end_lineno - 1] + node.end_col_offset
        replacements.append((start, end, ast.unparse(ast.ImportFrom(flat_name(target), node.names, level=1))))
    for start, end, statement in sorted(replacements, reverse=True):
        text = text[:start] + statement.encode() + text[end:]
    return text.decode(), imported


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    return spec.submodule_search_locations is not None


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    assert spec.origin is not None, f"{module} has no file"
    return Path(spec.origin).read_text(encoding="utf-8")
