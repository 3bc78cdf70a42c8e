"""Sizes of a mixture-of-experts feed-forward, stated without torch; its algebra is in `model.mixture`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multimatrix.errors import InputError
from multimatrix.fields import changed_sizes, check_sizes


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """num_experts (E) SwiGLUs of which each token takes experts_per_token (K), and one that all tokens take.

    intermediate_size: width of each expert. shared_intermediate_size: width of the shared expert, 0 for none.
    normalize_weights: divide the weights of a token's experts by their sum; with one expert per token the router then
    learns from the balancing loss alone. layers: numbers of the layers that have experts, None for all; the others keep
    the dense feed-forward.

    Raises:
        InputError: the sizes cannot work together; the sentence has the numbers and the way out.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    normalize_weights: bool = True
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        least = {"num_experts": 1, "experts_per_token": 1, "intermediate_size": 1, "shared_intermediate_size": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if not _is_whole(value) or value < minimum:
                raise InputError(
                    f"mixture_of_experts: {name} must be a whole number of at least {minimum}, got {value!r}"
                )
        if self.experts_per_token > self.num_experts:
            raise InputError(
                f"mixture_of_experts: a token cannot take {self.experts_per_token} of {self.num_experts} experts; "
                f"experts_per_token must be at most {self.num_experts}"
            )
        if not isinstance(self.normalize_weights, bool):
            raise InputError(
                f"mixture_of_experts: normalize_weights must be true or false, got {self.normalize_weights!r}"
            )
        if self.layers is None:
            return
        if not isinstance(self.layers, tuple) or not all(_is_whole(layer) for layer in self.layers):
            raise InputError(f"mixture_of_experts: layers must be a list of layer numbers, got {self.layers!r}")
        if not self.layers:
            raise InputError(
                "mixture_of_experts: layers is empty, so no layer has experts; name some, or leave "
                "mixture_of_experts out"
            )
        repeated = sorted({layer for layer in self.layers if self.layers.count(layer) > 1})
        if repeated:
            raise InputError(f"mixture_of_experts: layers names layer {repeated[0]} twice; name each once")

    def check_layers(self, num_hidden_layers: int) -> None:
        """InputError where `layers` names one that a decoder of this depth does not have."""
        missing = [layer for layer in self.layers or () if not 0 <= layer < num_hidden_layers]
        if missing:
            raise InputError(
                f"mixture_of_experts: there is no layer {missing[0]}; num_hidden_layers is {num_hidden_layers}, so "
                f"layers are numbered 0 to {num_hidden_layers - 1}"
            )

    def has_experts(self, layer: int) -> bool:
        """Whether this layer has experts in place of the dense feed-forward."""
        return self.layers is None or layer in self.layers

    def parameters(self, hidden_size: int) -> int:
        """Learned parameters of one layer's feed-forward: router, experts and shared expert."""
        return self._parameters(hidden_size, self.num_experts)

    def active_parameters(self, hidden_size: int) -> int:
        """Those of them that one token uses: the experts that it does not take are left out."""
        return self._parameters(hidden_size, self.experts_per_token)

    def _parameters(self, hidden_size: int, experts: int) -> int:
        widths = experts * self.intermediate_size + self.shared_intermediate_size
        return self.router_parameters(hidden_size) + 3 * hidden_size * widths

    def router_parameters(self, hidden_size: int) -> int:
        """Those of the router, one row per expert."""
        return self.num_experts * hidden_size

    @property
    def shape(self) -> str:
        """`2 of 8 x 512 + 1024`: experts of a token, of how many, their width, and the shared expert's."""
        shared = f" + {self.shared_intermediate_size}" if self.shared_intermediate_size else ""
        return f"{self.experts_per_token} of {self.num_experts} x {self.intermediate_size}{shared}"

    def to_dict(self) -> dict[str, Any]:
        """Every field that is not at its default, for configs and reports; `make_experts` reads it."""
        fields = changed_sizes(self).items()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}


def make_experts(sizes: Mapping[str, Any]) -> ExpertsSpec:
    """The spec that `sizes`, {"num_experts": 8, ...}, describes.

    Raises:
        InputError: a field is unknown or missing, or the sizes cannot work.
    """
    if not isinstance(sizes, Mapping):
        raise InputError(f"mixture_of_experts is a table of sizes such as {{'num_experts': 8, ...}}, got {sizes!r}")
    check_sizes("mixture_of_experts", sizes, ExpertsSpec)
    values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    return ExpertsSpec(**values)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
