"""Multi-matrix Factorization Attention (MFA, MFA-KR) and a fair test bench for attention that saves KV cache.

Specs, tables and planning need no torch; the names that do are imported on first use. The model classes are known to
transformers' Auto classes as soon as this package is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from multimatrix.attention import VARIANTS, AttentionSpec, make_spec
from multimatrix.errors import InputError

if TYPE_CHECKING:
    from multimatrix.attention.module import Attention
    from multimatrix.model.configuration import MultimatrixConfig
    from multimatrix.model.modeling import MultimatrixForCausalLM, MultimatrixModel

__version__ = "0.1.0"

_LAZY = {
    "Attention": "multimatrix.attention.module",
    "MultimatrixConfig": "multimatrix.model.configuration",
    "MultimatrixForCausalLM": "multimatrix.model.modeling",
    "MultimatrixModel": "multimatrix.model.modeling",
}

__all__ = [
    "VARIANTS",
    "Attention",
    "AttentionSpec",
    "InputError",
    "MultimatrixConfig",
    "MultimatrixForCausalLM",
    "MultimatrixModel",
    "make_spec",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'multimatrix' has no attribute {name!r}")


# The Auto classes know our classes once both are imported, whichever comes first. The modules that define ours do not
# register them: copies of these modules travel with a checkpoint, and transformers finds those by the checkpoint's own
# `auto_map`. transformers takes seconds to import, so nothing is imported before somebody asks for it.
@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _import_config(_: Any) -> None:
    importlib.import_module("multimatrix.model.configuration")


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _import_models(_: Any) -> None:
    importlib.import_module("multimatrix.model.modeling")


@wrapt.when_imported("multimatrix.model.configuration")
def _register_config(ours: Any) -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(ours.MultimatrixConfig.model_type, ours.MultimatrixConfig)


@wrapt.when_imported("multimatrix.model.modeling")
def _register_models(ours: Any) -> None:
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

    AutoModel.register(ours.MultimatrixConfig, ours.MultimatrixModel)
    AutoModelForCausalLM.register(ours.MultimatrixConfig, ours.MultimatrixForCausalLM)
