"""The options of the commands that train: one definition for all of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from multimatrix.cli.options import Sizes, split_labels

# Parameter -> its type with the help, and the setting of `train.configuration.Settings` where that is called otherwise.
_DATA = "File, folder or hub:OWNER/NAME; repeatable. Default: Python's standard library."
_OPTIONS: dict[str, tuple[Any, str, str]] = {
    "data": (list[str], _DATA, ""),
    "tokenizer": (str, "bytes, bpe:N, a file, a folder or a hub name.", ""),
    "validation_fraction": (float, "Share of the text held out, by document.", ""),
    "validation_tokens": (int, "Validate on at most so many tokens.", ""),
    "token_cache": (str, "Folder that keeps tokenized text; default: MULTIMATRIX_CACHE, or the user's cache.", ""),
    "hidden_size": (int, "H, elements of the hidden vector.", ""),
    "layers": (int, "Number of decoder layers.", "num_hidden_layers"),
    "head_dim": (int, "Head dim of MHA; the variants' sizes follow.", ""),
    "intermediate_size": (int, "Feed-forward width; in a comparison, the baseline's.", ""),
    "experts": (int, "Experts per layer, a mixture in place of the FFN.", "num_experts"),
    "experts_per_token": (int, "Experts that a token takes.", ""),
    "expert_size": (int, "Width of each expert.", ""),
    "shared_expert_size": (int, "Width of the expert that all tokens take.", ""),
    "position": (str, "rope, alibi or none.", ""),
    "rope_theta": (float, "Base of the rotary frequencies.", ""),
    "context": (int, "Tokens per training sequence.", ""),
    "max_positions": (int, "Positions of the model; default: the context.", "max_position_embeddings"),
    "steps": (int, "Optimizer steps per run.", ""),
    "batch_size": (int, "Sequences per step, over all processes together.", ""),
    "learning_rate": (float, "Peak of the cosine schedule.", ""),
    "warmup_fraction": (float, "Share of the steps that warm up.", ""),
    "weight_decay": (float, "Of the optimizer.", ""),
    "optimizer": (str, "adamw, or muon for the layers' matrices.", ""),
    "evaluations": (int, "Validation points per run.", ""),
    "precision": (str, "auto, float32 or bfloat16.", ""),
    "compile": (bool, "torch.compile the model.", ""),
    "latent_scaling": (bool, "Scale low-rank latents by sqrt(H/rank).", ""),
    "zero_init_output": (bool, "Start attention outputs at zero.", ""),
    "depth_scaled_init": (bool, "Paper's 1/sqrt(2 layer) rule.", ""),
    "initializer_range": (float, "Initial std; default: 1/sqrt(hidden size).", ""),
    "tie_embeddings": (bool, "One matrix for embedding and head.", "tie_word_embeddings"),
    "micro_batch_size": (int, "Sequences a process takes at once; more accumulate gradients.", ""),
    "activation_checkpointing": (bool, "Compute activations again instead of keeping them.", ""),
    "checkpoint_interval": (int, "Steps between checkpoints; default: a tenth of the run.", ""),
    "keep_checkpoints": (int, "How many checkpoints are kept.", ""),
    "log_interval": (int, "Steps between metrics rows.", ""),
    "report_to": (str, "Comma-separated: tensorboard, wandb, trackio.", ""),
}


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of every training setting; they come to it as the dictionary `settings`.

    They stand where `settings` stands among its parameters. None is an option that was not given.
    """
    options = [inspect.Parameter("sizes", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Sizes)]
    for name, (kind, help_text, _) in _OPTIONS.items():
        annotation: Any = Annotated[kind | None, typer.Option(help=help_text)]
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    @functools.wraps(command)
    def with_options(**words: Any) -> None:
        settings = {"sizes": words.pop("sizes") or None}
        for name, (_, _, setting) in _OPTIONS.items():
            value = words.pop(name)
            settings[setting or name] = None if value == [] else value
        if settings["report_to"] is not None:
            settings["report_to"] = split_labels(settings["report_to"])
        command(**words, settings=settings)

    own = inspect.signature(command, eval_str=True).parameters
    parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        parameters += options if name == "settings" else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options
