"""The decoder. Importing this package registers its classes with transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.model.modeling import MultimatrixForCausalLM, MultimatrixModel, MultimatrixPreTrainedModel

__all__ = ["MultimatrixConfig", "MultimatrixForCausalLM", "MultimatrixModel", "MultimatrixPreTrainedModel"]

AutoConfig.register(MultimatrixConfig.model_type, MultimatrixConfig)
AutoModel.register(MultimatrixConfig, MultimatrixModel)
AutoModelForCausalLM.register(MultimatrixConfig, MultimatrixForCausalLM)
