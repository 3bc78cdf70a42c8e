"""config.json of Step-3's format from ours and back, and every reason why one cannot be had."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from multimatrix.attention.mfa import MFASpec
from multimatrix.convert.step3_format import (
    ARCHITECTURE,
    ATTENTION_FIELDS,
    CONTEXT_FIELDS,
    DTYPES,
    EXPERT_FIELDS,
    FIXED_FIELDS,
    KNOWN_FIELDS,
    LAYERS,
    MODEL_FIELDS,
    MODEL_TYPE,
    NORMALIZE,
    TOKEN_FIELDS,
    layers_text,
)
from multimatrix.errors import InputError
from multimatrix.model.experts import ExpertsSpec

if TYPE_CHECKING:
    from multimatrix.model.configuration import MultimatrixConfig


# ---- ours -> Step-3's --------------------------------------------------------------------------------------------


def to_step3(config: MultimatrixConfig) -> dict[str, Any]:
    """config.json of the format.

    Raises:
        InputError: the format cannot state this model; the sentence has the reason and, where there is one, the way.
    """
    spec = _statable_attention(config)
    experts = config.experts_spec()
    if experts is not None and not experts.shared_intermediate_size:
        raise InputError(
            "Step-3's format has a shared expert in every expert layer, but shared_intermediate_size is 0; train with "
            "one"
        )
    layers = [n for n in range(config.num_hidden_layers) if experts is not None and experts.has_experts(n)]
    tokens = {name: getattr(config, name) for name in TOKEN_FIELDS if getattr(config, name) is not None}
    dtype = {"torch_dtype": str(config.dtype).removeprefix("torch.")} if config.dtype is not None else {}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{theirs: getattr(config, ours) for ours, theirs in MODEL_FIELDS.items()},
        **{theirs: getattr(spec, ours) for ours, theirs in ATTENTION_FIELDS.items()},
        "num_attention_groups": 1,
        "max_seq_len": config.max_position_embeddings,
        "max_position_embedding": config.max_position_embeddings,
        "rope_theta": config.rope.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        # Where a field is left out, loaders fill in the sizes of Step-3 itself.
        **{theirs: getattr(experts, ours, 0) for ours, theirs in EXPERT_FIELDS.items()},
        NORMALIZE: experts is not None and experts.normalize_weights,
        LAYERS: layers_text(layers),
        "tie_word_embeddings": False,
        "use_cache": config.use_cache,
        **tokens,
        **dtype,
    }


def _statable_attention(config: MultimatrixConfig) -> MFASpec:
    """The attention that all layers share."""
    first, *others = config.layer_specs()
    for layer, spec in enumerate(others, start=1):
        if spec != first:
            raise InputError(
                f"Step-3's format states one attention for all layers, but layer 0 has {first.to_dict()} and layer "
                f"{layer} {spec.to_dict()}; export a model whose layers are alike"
            )
    if first.variant == "mfa_kr":
        raise InputError(
            "Step-3's format caches a value of its own and has no place for MFA-KR's value made from the key; "
            "train with variant 'mfa'"
        )
    if not isinstance(first, MFASpec):
        raise InputError(f"Step-3's format states MFA alone, not {first.variant}; train with variant 'mfa'")
    if first.position != "rope":
        raise InputError(
            f"Step-3's format rotates every head (RoPE), but position is {first.position!r}; train with 'rope'"
        )
    for name, value, wanted in (
        ("query_norm", first.query_norm, True),
        ("rotary_blocks", first.rotary_blocks, 1),
        ("rotary_dim", first.rope_dim, first.head_dim),
    ):
        if value != wanted:
            raise InputError(
                f"Step-3's format has {name}={wanted}, but this model has {name}={value}; train with {wanted}"
            )
    usual = first.head_dim**-0.5
    if not math.isclose(first.scale, usual, rel_tol=1e-12):
        raise InputError(
            f"Step-3's format multiplies scores by head_dim^-0.5 = {usual:.6g}, but softmax_scale is "
            f"{first.scale:.6g}; multiply every q_b_proj by {first.scale / usual:.6g} and leave softmax_scale out"
        )
    if first.latent_scaling:
        raise InputError(
            "Step-3's format does not scale latents; multiply every q_a_norm by sqrt(hidden_size / query_rank) = "
            f"{first.latent_scale(first.query_rank):.6g} and set latent_scaling=false"
        )
    if config.rope.rope_type != "default":
        raise InputError(
            f"rope_type {config.rope.rope_type!r} is not exported to Step-3's format, only 'default'; set it in "
            "the engine"
        )
    _refuse_rounded_sizes(first)
    return first


def _refuse_rounded_sizes(spec: MFASpec) -> None:
    rank, dim = spec.query_rank, spec.head_dim
    if not loads_exactly(rank, dim):
        other_rank = _nearest(rank, lambda other: loads_exactly(other, dim))
        other_dim = _nearest(dim, lambda other: loads_exactly(rank, other))
        raise InputError(
            f"engines that load Step-3's format misplace its projections by rounding at query_rank {rank} with "
            f"head_dim {dim}; the nearest that work are query_rank {other_rank} or head_dim {other_dim}"
        )


def loads_exactly(query_rank: int, head_dim: int) -> bool:
    """Whether loaders put q_proj, k_proj and v_proj where they belong.

    They fill one matrix of query_rank + 2 head_dim rows and find each part's first and last row as the integer part
    of a fraction of the total times the total, in float64, which can come out one short (vLLM, `load_weights` of
    `Step3TextForCausalLM`).
    """
    total = query_rank + 2 * head_dim
    return all(int(edge / total * total) == edge for edge in (query_rank, query_rank + head_dim, total))


def _nearest(size: int, works: Callable[[int], bool]) -> int:
    """The nearest size that works, a multiple of the same power of two up to 64, the smaller of two."""
    step = math.gcd(size, 64)
    candidates = range(step, 2 * size + 64, step)
    return min((other for other in candidates if works(other)), key=lambda other: abs(other - size))


# ---- Step-3's -> ours --------------------------------------------------------------------------------------------


def from_step3(fields: Mapping[str, Any], expert_layers: Iterable[int]) -> dict[str, Any]:
    """The arguments of a `MultimatrixConfig`.

    expert_layers: the layers that hold experts by the tensors' names, for the advice where moe_layers_enum is absent.

    Raises:
        InputError: a field is missing, is no number, or says what our decoder does not do.
    """
    for name, value in fields.items():
        if name not in KNOWN_FIELDS:
            raise InputError(
                f"its config.json has the field {name}, which is not part of the format; "
                "remove it if it changes nothing that is computed"
            )
        if name in FIXED_FIELDS and value not in FIXED_FIELDS[name]:
            raise InputError(
                f"its config.json says {name} = {value!r}, and only {FIXED_FIELDS[name][0]!r} can be imported"
            )
    layers = _expert_layers(fields, expert_layers)
    contexts = [_count(fields, name) for name in CONTEXT_FIELDS if fields.get(name) is not None]
    if not contexts:
        raise InputError(f"its config.json has none of {', '.join(CONTEXT_FIELDS)}; add the longest context")
    dtype = fields.get("dtype") or fields.get("torch_dtype")
    if dtype not in (None, *DTYPES):
        raise InputError(f"its config.json says dtype = {dtype!r}, and only {', '.join(DTYPES)} can be imported")
    tokens = {name: _token(fields, name) for name in TOKEN_FIELDS if fields.get(name) is not None}
    return {
        **{ours: _count(fields, theirs) for ours, theirs in MODEL_FIELDS.items()},
        "max_position_embeddings": min(contexts),
        "attention": {
            "variant": MFASpec.variant,
            **{ours: _count(fields, theirs) for ours, theirs in ATTENTION_FIELDS.items()},
            "query_norm": True,
        },
        **({"mixture_of_experts": _experts(fields, layers)} if layers else {}),
        "rope_parameters": {"rope_type": "default", "rope_theta": _rope_theta(fields)},
        "rms_norm_eps": _positive(fields, "rms_norm_eps"),
        "tie_word_embeddings": False,
        "use_cache": fields.get("use_cache", True),
        **tokens,
        **({"dtype": dtype} if dtype is not None else {}),
    }


def _experts(fields: Mapping[str, Any], layers: list[int]) -> dict[str, Any]:
    normalize = fields.get(NORMALIZE, False)
    if not isinstance(normalize, bool):
        raise InputError(f"its config.json says {NORMALIZE} = {normalize!r}, which must be true or false")
    sizes = {ours: _count(fields, theirs) for ours, theirs in EXPERT_FIELDS.items()}
    everywhere = layers == list(range(fields["num_hidden_layers"]))
    return ExpertsSpec(**sizes, normalize_weights=normalize, layers=None if everywhere else tuple(layers)).to_dict()


def _expert_layers(fields: Mapping[str, Any], by_tensors: Iterable[int]) -> list[int]:
    """moe_layers_enum as numbers.

    Loaders split a string; they fail on "" and on a list, and where the field is missing or null some take all layers
    but the first and some fail. What was meant cannot be known then, so it has to be said.
    """
    text, count = fields.get(LAYERS), _count(fields, "num_hidden_layers")
    try:
        numbers = [int(part) for part in text.split(",")] if isinstance(text, str) else None
    except ValueError:
        numbers = None
    if numbers is None:
        said = f"{LAYERS} = {text!r}" if LAYERS in fields else f"no {LAYERS}"
        raise InputError(
            f"its config.json has {said}, which loaders read differently or fail on; by its tensors it is the string "
            f'"{layers_text(by_tensors)}"'
        )
    if numbers == [-1]:
        return []
    for number in numbers:
        if not 0 <= number < count:
            raise InputError(
                f"its config.json lists layer {number} in {LAYERS}, but the {count} layers are 0 to {count - 1}"
            )
    return sorted(set(numbers))


def _rope_theta(fields: Mapping[str, Any]) -> float:
    """The base, from the field of its own or from the tables in which transformers states it."""
    bases = [_positive(fields, "rope_theta")] if fields.get("rope_theta") is not None else []
    for name in ("rope_scaling", "rope_parameters"):
        table = fields.get(name) or {}
        plain = isinstance(table, dict) and {"rope_type", "type", "rope_theta"}.issuperset(table)
        if not plain or any(table.get(key) not in ("default", None) for key in ("rope_type", "type")):
            raise InputError(f"its config.json says {name} = {table!r}, and only plain RoPE can be imported")
        if "rope_theta" in table:
            bases.append(_positive(table, "rope_theta"))
    if len(set(bases)) != 1:
        raise InputError(f"its config.json must state one rope_theta, but has {bases or 'none'}")
    return bases[0]


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(_not_a(fields, name, "a whole number of at least 1"))
    return value


def _positive(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise InputError(_not_a(fields, name, "a positive number"))
    return float(value)


def _token(fields: Mapping[str, Any], name: str) -> int | list[int]:
    value = fields[name]
    numbers = value if isinstance(value, list) and name == "eos_token_id" else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise InputError(_not_a(fields, name, "the number of a token"))
    return value


def _not_a(fields: Mapping[str, Any], name: str, kind: str) -> str:
    has = f"{name} = {fields[name]!r}" if name in fields else f"no {name}"
    return f"its config.json has {has}, which must be {kind}"
