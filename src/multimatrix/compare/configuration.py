"""What a comparison is: one protocol, several variants and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from multimatrix.errors import InputError
from multimatrix.train.configuration import MAX_SEED, Settings


@dataclass(frozen=True, kw_only=True)
class Comparison(Settings):
    """Every setting of a comparison; all variants share all of them but their attention sizes.

    variants: labels, see `attention.sizes`. intermediate_size and the experts' sizes are the baseline's. match:
    "parameters" lets the feed-forward width make up the difference in attention parameters, "none" keeps it.
    """

    variants: tuple[str, ...] = ("mha", "gqa", "mqa", "mla", "mfa", "mfa_kr")
    seeds: tuple[int, ...] = (0, 1, 2)
    match: str = "parameters"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds:
            raise InputError("no seeds were given; name at least one, for example --seeds 0,1")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0 or max(self.seeds) > MAX_SEED:
            seeds = ", ".join(map(str, self.seeds))
            raise InputError(f"seeds must be different whole numbers from 0 to {MAX_SEED}, got {seeds}")
        if self.match not in ("parameters", "none"):
            raise InputError(f"match must be parameters or none, got {self.match!r}")

    @property
    def baseline(self) -> str:
        """What the others are matched to and judged against: MHA if it takes part, else the first variant."""
        return "mha" if "mha" in self.variants else self.variants[0]


def make_comparison(preset: str | None, settings: dict[str, Any]) -> Comparison:
    """A preset, or the defaults, with `settings` over it; None means not given.

    Raises:
        InputError: there is no such preset, or the settings cannot work.
    """
    return Comparison.from_recipe("compare", preset, settings)
