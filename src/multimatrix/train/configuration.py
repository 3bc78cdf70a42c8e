"""The settings of one trained model: sizes, text, protocol and how the run is carried out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerFast

from multimatrix.attention import AttentionSpec
from multimatrix.data.prepare import PreparedText, prepare_text
from multimatrix.errors import InputError
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.model.experts import ExpertsSpec
from multimatrix.recipes import Kind, read_recipe
from multimatrix.train.protocol import OPTIMIZERS, TRACKERS, Execution, Protocol

# What numpy's generator takes.
MAX_SEED = 2**32 - 1
# The sizes of a mixture of experts; all but the last belong together.
EXPERTS = ("num_experts", "experts_per_token", "expert_size", "shared_expert_size")
EXECUTION = tuple(field.name for field in dataclasses.fields(Execution))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a single run and every run of a comparison share.

    sizes: `label.field=value` overrides. head_dim: of MHA, from which the variants' customary sizes follow.
    intermediate_size: feed-forward width; None for 8/3 hidden_size rounded to a multiple of 8. num_experts,
    experts_per_token, expert_size, shared_expert_size: of a mixture of experts in place of every dense feed-forward,
    see `model.experts.ExpertsSpec`; none for dense ones. data: files, folders and hub data sets; none for the embedded
    default. validation_tokens: how many tokens of the validation documents are used at most. token_cache: the
    folder of `data.cache`, None for this user's. latent_scaling,
    zero_init_output, depth_scaled_init: switches that act alike on every variant, see `AttentionSpec` and
    `MultimatrixConfig`. initializer_range: std of every initial weight matrix; None for 1/sqrt(hidden_size), which is
    0.022 at the paper's 2,048: a fixed 0.02 starts narrow models near zero, and low-rank factors, two maps in a row,
    twice as near. The training settings are those of `train.protocol.Protocol`; precision "auto" is bfloat16 on a
    GPU and float32 elsewhere. The rest is `train.protocol.Execution`.
    """

    sizes: tuple[str, ...] = ()
    hidden_size: int = 512
    num_hidden_layers: int = 8
    head_dim: int = 64
    intermediate_size: int | None = None
    num_experts: int | None = None
    experts_per_token: int | None = None
    expert_size: int | None = None
    shared_expert_size: int | None = None
    position: str = "rope"
    rope_theta: float = 10_000.0
    latent_scaling: bool = False
    zero_init_output: bool = False
    depth_scaled_init: bool = False
    initializer_range: float | None = None
    tie_word_embeddings: bool = True
    max_position_embeddings: int | None = None
    data: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    validation_fraction: float = 0.1
    validation_tokens: int = 1_000_000
    token_cache: str | None = None
    steps: int = 2_000
    batch_size: int = 32
    context: int = 512
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.1
    weight_decay: float = 0.1
    evaluations: int = 10
    precision: str = "auto"
    optimizer: str = "adamw"
    compile: bool = False
    micro_batch_size: int | None = None
    activation_checkpointing: bool = False
    fsdp: bool = False
    checkpoint_interval: int | None = None
    keep_checkpoints: int = 2
    log_interval: int | None = None
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "head_dim",
            "validation_tokens",
            "steps",
            "batch_size",
            "evaluations",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        given = [name for name in EXPERTS if getattr(self, name) is not None]
        missing = [name for name in EXPERTS[:3] if name not in given]
        if given and missing:
            raise InputError(f"a mixture of experts needs {', '.join(EXPERTS[:3])}; give also {', '.join(missing)}")
        for name in (
            "intermediate_size",
            "max_position_embeddings",
            *EXPERTS[:3],
            "micro_batch_size",
            "checkpoint_interval",
            "log_interval",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.experts is not None and self.intermediate_size is not None:
            raise InputError(
                f"with {self.num_experts} experts in every layer intermediate_size has no effect; leave it out, or "
                "the experts"
            )
        if self.context < 2:
            raise InputError(
                f"context must be at least 2, got {self.context}: the first token of a row is not predicted"
            )
        if self.context > self.positions:
            raise InputError(
                f"the context of {self.context} tokens is longer than the {self.positions} positions of the model; "
                f"lower --context or raise --max-positions to {self.context}"
            )
        for name in ("learning_rate", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a positive number, got {getattr(self, name)}")
        if self.initializer_range is not None and not 0 < self.initializer_range <= 1:
            raise InputError(f"initializer_range must be above 0 and at most 1, got {self.initializer_range}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be a number from 0 on, got {self.weight_decay}")
        if not 0 <= self.warmup_fraction < 1:
            raise InputError(f"warmup_fraction must be from 0 to below 1, got {self.warmup_fraction}")
        if self.evaluations > self.steps:
            raise InputError(
                f"{self.evaluations} evaluations do not fit into {self.steps} steps; "
                f"lower --evaluations to at most {self.steps} or raise --steps"
            )
        if not all(self.data):
            raise InputError("a source of text has no name; give a file, a folder or hub:OWNER/NAME")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise InputError(f"precision must be auto, float32 or bfloat16, got {self.precision!r}")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"optimizer must be {' or '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        for name in self.report_to:
            if name not in TRACKERS:
                raise InputError(f"there is no tracker {name!r}; report_to takes {', '.join(TRACKERS)}")

    @property
    def experts(self) -> ExpertsSpec | None:
        """The mixture of experts; None for a dense feed-forward."""
        if self.num_experts is None or self.experts_per_token is None or self.expert_size is None:
            return None
        return ExpertsSpec(
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            intermediate_size=self.expert_size,
            shared_intermediate_size=self.shared_expert_size or 0,
            # A single weight divided by itself is 1, from which the router would learn nothing.
            normalize_weights=self.experts_per_token > 1,
        )

    @property
    def positions(self) -> int:
        """max_position_embeddings, by default the context."""
        return self.max_position_embeddings if self.max_position_embeddings is not None else self.context

    @property
    def initial_std(self) -> float:
        """initializer_range, by default 1/sqrt(hidden_size)."""
        return self.initializer_range if self.initializer_range is not None else self.hidden_size**-0.5

    @property
    def feed_forward_width(self) -> int:
        """intermediate_size, by default 8/3 hidden_size."""
        return self.intermediate_size or max(8, round(self.hidden_size / 3) * 8)

    def protocol(self, device_type: str) -> Protocol:
        """The training settings on this kind of device."""
        names = [field.name for field in dataclasses.fields(Protocol) if field.name != "precision"]
        automatic = "bfloat16" if device_type == "cuda" else "float32"
        precision = automatic if self.precision == "auto" else self.precision
        return Protocol(**{name: getattr(self, name) for name in names}, precision=precision)

    def execution(self) -> Execution:
        """How the run is carried out."""
        return Execution(**{name: getattr(self, name) for name in EXECUTION})

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result: all but the cache and those of `Execution`."""
        aside = {*EXECUTION, "token_cache"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in aside}

    def prepare_text(self, say: Callable[[str], None]) -> PreparedText:
        """Read, tokenize and pack; see `data.prepare`."""
        return prepare_text(
            self.data,
            self.tokenizer,
            context=self.context,
            batch_size=self.batch_size,
            validation_fraction=self.validation_fraction,
            validation_tokens=self.validation_tokens,
            cache=Path(self.token_cache) if self.token_cache is not None else None,
            say=say,
        )

    def model_config(
        self,
        spec: AttentionSpec,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        *,
        intermediate_size: int,
        experts: ExpertsSpec | None,
    ) -> MultimatrixConfig:
        """The model of these settings with this attention and feed-forward."""
        return MultimatrixConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            max_position_embeddings=self.positions,
            attention=spec.to_dict(),
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=self.tie_word_embeddings,
            depth_scaled_init=self.depth_scaled_init,
            initializer_range=self.initial_std,
            zero_init_output=self.zero_init_output,
            mixture_of_experts=experts.to_dict() if experts is not None else None,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    @classmethod
    def from_recipe(cls, kind: Kind, name: str | None, settings: dict[str, Any]) -> Self:
        """A recipe, or the defaults, with `settings` over it; None means not given.

        Raises:
            InputError: there is no such recipe, or the settings cannot work.
        """
        values = {} if name is None else read_recipe(kind, name)
        known = [field.name for field in dataclasses.fields(cls)]
        for field in values:
            if field not in known:
                raise InputError(
                    f"the recipe {name} has a setting {field!r}, which there is not; there are {', '.join(known)}"
                )
        values |= {name: value for name, value in settings.items() if value is not None}
        frozen: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**frozen)


@dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """Every setting of `multimatrix train`.

    variant: its label, see `attention.sizes`. seed: of the initial weights and the order of the data. log_interval is
    1 by default.
    """

    variant: str = "mfa"
    seed: int = 0
    log_interval: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"the seed must be a whole number from 0 to {MAX_SEED}, got {self.seed}")
