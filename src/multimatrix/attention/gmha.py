"""Generalized multi-head attention: what every variant has in common, stated without torch.

Every variant is a sum over heads c of a query-key circuit W_c and a value-output circuit U_c, both H x H,
around a causal softmax (Multi-matrix Factorization Attention, arXiv 2412.19255, section 2):

    O_i = sum_c sum_{j<=i} softmax_j(x_i W_c x_j^T * scale) x_j U_c

A variant is a factorization of W_c and U_c, and runs in five steps:

    hidden x --project--> query q, latents (what the cache stores)
             --cache----> all latents so far
             --attend---> o = softmax(q . keys(latents)) values(latents)
             --emit-----> hidden y

A variant is one file: a frozen spec that states its factors, its numbers and its algebra. The algebra is a few
methods that take the weights `w` (an `attention.module.Attention`, or anything with the same attributes) and
tensors. Specs import no torch, so that planning and tables start at once.

Legend of the shape letters used in every comment of this package:

    B  sequences in the batch              H  hidden_size
    T  new tokens of this call             N  query heads (num_heads)
    S  cached tokens (slots), S >= T       G  key heads that the cache holds
    D  dim of a query and key head         V  dim of a value head
    C  dim of a shared latent              R  query rank
    E  rotary part of an MLA key           L  layers
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from multimatrix.errors import InputError
from multimatrix.fields import changed_sizes, check_most

if TYPE_CHECKING:
    from torch import Tensor

    from multimatrix.attention.module import Attention
    from multimatrix.ops.reference import Circuits
    from multimatrix.ops.rotary import Rotation

Position = Literal["rope", "alibi", "none"]
# Where attention reads its values: a tensor of their own, the cached key itself, its leading `value_dim`
# elements, or the cached key before rotation (keys are then rotated when scores are made).
ValueSource = Literal["own", "key", "slice", "unrotated"]


@dataclass(frozen=True)
class Weight:
    """One learned tensor: a "linear" map [out, in] without bias, a "norm" scale [dim] or a "gate" [dim].

    heads: the axis that is made of heads one after the other, "out" or "in"; None where all heads share the tensor.
    Tensor parallelism cuts that axis and replicates the rest.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["linear", "norm", "gate"] = "linear"
    heads: Literal["out", "in"] | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class CacheLayout:
    """What one layer caches for one token.

    key: (heads, dim) of the first tensor, stored as [B, heads, S, dim].
    value: (heads, dim) of the second tensor, or None where the value is read off the first.
    source: how attention obtains the value.
    """

    key: tuple[int, int]
    value: tuple[int, int] | None
    source: ValueSource = "own"

    @property
    def vectors(self) -> tuple[tuple[int, int], ...]:
        """(heads, dim) of every tensor."""
        return (self.key,) if self.value is None else (self.key, self.value)

    @property
    def elements(self) -> int:
        """Elements per token and layer."""
        return sum(math.prod(vector) for vector in self.vectors)


@dataclass(frozen=True)
class Capacity:
    """A row of the paper's capacity table, for one layer.

    rank_per_head: rank of each head's circuits as the paper counts it, the head's dim. shared_latent_dim: dim of the
    space all heads read from (the paper's SLSD). total_effective_rank: heads times rank per head (TER).
    """

    heads: int
    rank_per_head: int
    shared_latent_dim: int

    @property
    def total_effective_rank(self) -> int:
        return self.heads * self.rank_per_head


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(ABC):
    """The numbers and the algebra of one attention variant.

    hidden_size: H. num_heads: N, the query heads. position: "rope", "alibi" or "none". rotary_dim: how many
    leading elements of every rotated vector RoPE turns, None for all. softmax_scale: multiplies the scores, None
    for 1/sqrt(D). latent_scaling: multiply every low-rank latent that is projected up again by sqrt(H/rank), after its
    norm where it has one; variants without such a latent are unchanged.

    Raises:
        InputError: the sizes cannot work together; the sentence has the numbers and the way out.
    """

    variant: ClassVar[str]
    # The factor that writes to the residual stream; a zero-initialized output sets it to zero.
    output_weight: ClassVar[str] = "o_proj"

    hidden_size: int
    num_heads: int
    position: Position = "rope"
    rotary_dim: int | None = None
    softmax_scale: float | None = None
    latent_scaling: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_kind(field, getattr(self, field.name))
        if self.position not in ("rope", "alibi", "none"):
            raise InputError(f"{self.variant}: position must be rope, alibi or none, got {self.position!r}")
        if self.softmax_scale is not None and not self.softmax_scale > 0:
            raise InputError(f"{self.variant}: softmax_scale must be positive, got {self.softmax_scale}")
        self.validate()
        rotated = self.rotary_dim if self.rotary_dim is not None else self.rotated_width
        if self.position == "rope" and not (0 < rotated <= self.rotated_width and rotated % 2 == 0):
            even = max(2, min(rotated, self.rotated_width) // 2 * 2)
            way_out = f"use {even}" if even <= self.rotated_width else "use a wider head or position='none'"
            raise InputError(
                f"{self.variant}: RoPE turns pairs, so the rotary dim must be even and between 2 and "
                f"{self.rotated_width}, got {rotated}; {way_out}"
            )

    def _check_kind(self, field: dataclasses.Field[Any], value: Any) -> None:
        """InputError where a count is no count, a factor no number or a switch no switch."""
        annotation = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        kind, _, optional = annotation.partition(" | ")
        if optional and value is None:
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind == "bool" and not isinstance(value, bool):
            raise InputError(f"{self.variant}: {field.name} must be true or false, got {value!r}")
        if kind == "float" and not (is_number and math.isfinite(value)):
            raise InputError(f"{self.variant}: {field.name} must be a number, got {value!r}")
        if kind == "int" and not (is_number and isinstance(value, int)):
            raise InputError(f"{self.variant}: {field.name} must be a whole number, got {value!r}")
        if kind == "int" and value < 1 and field.name != "rotary_dim":  # RoPE has a sentence of its own
            raise InputError(f"{self.variant}: {field.name} must be at least 1, got {value}")
        if kind == "int":
            check_most(f"{self.variant}: {field.name}", value)

    # ---- the numbers: what a variant states -------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def sized(cls, hidden_size: int, head_dim: int, **options: Any) -> Self:
        """The variant at its customary sizes beside an MHA of hidden_size / head_dim heads."""

    @property
    @abstractmethod
    def weights(self) -> tuple[Weight, ...]:
        """Every learned tensor; parameter and FLOP counts and the module are all made from this list."""

    @property
    @abstractmethod
    def cache(self) -> CacheLayout:
        """What is cached per token and layer."""

    @property
    @abstractmethod
    def capacity(self) -> Capacity:
        """The variant's row of the paper's capacity table."""

    @property
    @abstractmethod
    def head_dims(self) -> tuple[int, int]:
        """(D, V): dims of a head's query-key product and of its value, in training."""

    @property
    def cached_head_dims(self) -> tuple[int, int]:
        """(D, V) when attention reads the cached latents directly, as in decoding."""
        return self.head_dims

    @property
    def rotated_width(self) -> int:
        """Width of the vectors that RoPE turns; `rotary_dim` leading elements of each are turned."""
        return self.head_dims[0]

    @property
    def tensor_parallel_plan(self) -> dict[str, str]:
        """Weight -> transformers' parallel style; "" is the layer itself, and what is not named is replicated."""
        styles = {"out": "colwise", "in": "rowwise"}
        return {weight.name: styles[weight.heads] for weight in self.weights if weight.heads}

    def check_tensor_parallel(self, processes: int) -> None:
        """InputError where the heads cannot be shared out evenly to so many processes."""
        if self.num_heads % processes:
            raise InputError(
                f"{self.variant}: {self.num_heads} heads cannot be shared out to {processes} processes of tensor "
                "parallelism; their number must divide the heads"
            )
        groups = self.cache.key[0]
        if groups > 1 and groups % processes:
            raise InputError(
                f"{self.variant}: {groups} key heads cannot be shared out to {processes} processes of tensor "
                "parallelism; their number must divide the key heads, only a single key head is replicated"
            )

    def validate(self) -> None:  # noqa: B027
        """Raise InputError where the variant's own sizes cannot work together."""

    # ---- the algebra: tensors in, tensors out -----------------------------------------------------------------

    @abstractmethod
    def project(self, w: Attention, x: Tensor, rope: Rotation) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [B, T, H] -> query [B, N, T, D] and the latents to cache, one or two of [B, G, T, dim].

        w: the layer, its weights as submodules. `rope(t)` turns t at the positions of the new tokens. The query is
        always turned, and so is the key, unless the cache's source is "unrotated".
        """

    def emit(self, w: Attention, o: Tensor) -> Tensor:
        """Head outputs o [B, N, T, V] -> [B, T, H]."""
        return w.o_proj(o.transpose(1, 2).flatten(2))  # [B, T, H]

    # A variant whose training form differs from its cached form overrides the following; the others are computed
    # from the cached latents in training too.

    @property
    def has_expanded_form(self) -> bool:
        """Whether `expand` gives a training form that differs from attention over the cached latents."""
        return False

    def expand(self, w: Attention, latents: tuple[Tensor, ...], rope: Rotation) -> tuple[Tensor, Tensor]:
        """Latents -> keys [B, G, T, D] and values [B, G, T, V] of the training form."""
        raise NotImplementedError(f"{self.variant} has no expanded form")

    def absorb(self, w: Attention, q: Tensor) -> Tensor:
        """Query of the training form -> query that meets the cached latents."""
        return q

    def restore(self, w: Attention, o: Tensor, rope: Rotation) -> Tensor:
        """Attention output over cached latents -> head output of the training form [B, N, T, V]."""
        return o

    # ---- the oracle -------------------------------------------------------------------------------------------

    @abstractmethod
    def circuits(self, w: Mapping[str, Tensor], x: Tensor) -> Circuits:
        """The equations once more, head by head in full matrices, for `ops.reference`.

        w: weight name -> float64 tensor, linear weights as [out, in]. x: [T, H]. No caching, no sharing, no rotation:
        the reference turns the runs of elements named in `Circuits.rotated` itself.
        """

    # ---- what follows from the above --------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """What multiplies the scores."""
        return self.softmax_scale if self.softmax_scale is not None else self.head_dims[0] ** -0.5

    @property
    def rope_dim(self) -> int:
        """Elements that RoPE turns in every rotated vector; 0 without RoPE."""
        if self.position != "rope":
            return 0
        return self.rotary_dim if self.rotary_dim is not None else self.rotated_width

    @property
    def rope_blocks(self) -> int:
        """How many equal blocks of a head are rotated, each like a head of its own."""
        return 1

    def latent_scale(self, rank: int) -> float:
        """The factor on a low-rank latent of this rank (1 unless latent_scaling)."""
        return math.sqrt(self.hidden_size / rank) if self.latent_scaling else 1.0

    @property
    def parameters(self) -> int:
        """Learned parameters of one layer's attention, norms and gates included."""
        return sum(weight.elements for weight in self.weights)

    @property
    def extra_decode_products(self) -> int:
        """Multiply-adds per token that decoding needs beyond one use of every linear weight."""
        return 0

    @property
    def expansion_products(self) -> int:
        """Multiply-adds of `expand` for one cached token; a part of `linear_products`."""
        return 0

    @property
    def expanded_elements(self) -> int:
        """Elements per token and layer that `expand` makes, or the cache's own where there is nothing to expand."""
        return self.cache.elements

    @property
    def linear_products(self) -> int:
        """Multiply-adds of the linear maps per token: one use of every linear weight."""
        return sum(weight.elements for weight in self.weights if weight.kind == "linear")

    def decode_flops(self, context: int) -> int:
        """FLOPs of one layer's attention for one decoded token that sees `context` tokens, itself included.

        Matrix products only, two FLOPs per multiply-add, over the cached latents.
        """
        return 2 * (self.linear_products + self.extra_decode_products) + self.decode_core_flops(context)

    def decode_core_flops(self, context: int) -> int:
        """Those of them that grow with the context: scores and the weighted sum of the values."""
        return 2 * self.num_heads * sum(self.cached_head_dims) * context

    def prefill_flops(self, context: int) -> int:
        """FLOPs of one layer's attention per token of a sequence of `context`, forward only.

        Work on masked pairs is not counted.
        """
        extra = 0 if self.has_expanded_form else self.extra_decode_products
        return 2 * (self.linear_products + extra) + self.prefill_core_flops(context)

    def prefill_core_flops(self, context: int) -> int:
        """Those of them that grow with the context: a causal token sees (context + 1) / 2 tokens on average."""
        return self.num_heads * sum(self.head_dims) * (context + 1)

    def training_flops(self, context: int) -> int:
        """FLOPs of one layer's attention per trained token: forward once, backward twice that."""
        return 3 * self.prefill_flops(context)

    def to_dict(self) -> dict[str, Any]:
        """Variant name and every field that is not at its default, for configs and reports."""
        return {"variant": self.variant, **changed_sizes(self, besides=("hidden_size",))}


def split_heads(x: Tensor, dim: int) -> Tensor:
    """[B, T, heads * dim] -> [B, heads, T, dim], with as many heads as this process holds."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def join_heads(*parts: Tensor) -> Tensor:
    """Heads [B, N, T, dim] side by side, [B, N, T, sum of dims], stored token by token as `split_heads` has them."""
    import torch

    return torch.cat([part.transpose(1, 2) for part in parts], dim=-1).transpose(1, 2)


def side_by_side(x: Tensor, *linears: Any) -> tuple[Tensor, ...]:
    """What linear layers make of the same x.

    In training mode it is one product with their weights side by side, which costs narrow layers less than a product
    each, and x gets one gradient instead of a sum. Without gradients weights would be copied for nothing, and a layer
    that is more than its weight has to be asked itself.
    """
    import torch

    weights = [None if linear._forward_hooks else plain_weight(linear, x) for linear in linears]
    learned = [weight for weight in weights if weight is not None and weight.requires_grad]
    if not (linears[0].training and torch.is_grad_enabled()) or len(learned) < len(linears):
        return tuple(linear(x) for linear in linears)
    together = torch.nn.functional.linear(x, torch.cat(learned))
    return together.split([weight.shape[0] for weight in learned], dim=-1)


def linear_weight(linear: Any, like: Tensor) -> Tensor:
    """The matrix [out, in] that a linear layer applies to vectors such as `like`; see `plain_weight`."""
    import torch

    weight = plain_weight(linear, like)
    if weight is not None:
        return weight
    return linear(torch.eye(linear.in_features, dtype=like.dtype, device=like.device)).T


def plain_weight(linear: Any, like: Tensor) -> Tensor | None:
    """The weight [out, in] of a linear layer where the layer is nothing but the product with it, else None.

    Adapters, quantization, offloading and tensor parallelism stand between a layer's `weight` and its product; then
    the layer itself has to be asked.
    """
    import torch
    from torch.distributed.tensor import DTensor

    linear = getattr(linear, "_orig_mod", linear)  # of a layer that was compiled by itself
    if type(linear) is not torch.nn.Linear:
        return None
    weight = linear.weight
    return weight if not isinstance(weight, DTensor) and weight.device == like.device else None


def head_matrices(weight: Tensor, heads: int) -> Tensor:
    """A linear weight [heads * dim, in] as one matrix per head, x @ matrix, [heads, in, dim]."""
    return weight.unflatten(0, (heads, -1)).transpose(1, 2)


def output_matrices(weight: Tensor, heads: int) -> Tensor:
    """An output weight [H, heads * dim] as one matrix per head, o @ matrix, [heads, dim, H]."""
    return weight.unflatten(1, (heads, -1)).permute(1, 2, 0)
