"""`multimatrix compare`: every variant trained under one protocol."""

from __future__ import annotations

from typing import Annotated

import typer

from multimatrix.cli.options import Sizes, split_labels, whole_numbers


def compare(
    preset: Annotated[str | None, typer.Option(help="Start from these settings: demo.")] = None,
    variants: Annotated[str | None, typer.Option(help="Comma-separated; NAME@TAG for two settings of one.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated, for example 0,1,2.")] = None,
    sizes: Sizes = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="File, folder or hub:OWNER/NAME; repeatable. Default: Python's standard library."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bytes, bpe:N, a file, a folder or a hub name.")] = None,
    validation_fraction: Annotated[float | None, typer.Option(help="Share of the text held out, by document.")] = None,
    validation_tokens: Annotated[int | None, typer.Option(help="Validate on at most so many tokens.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="H, elements of the hidden vector.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of decoder layers.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Head dim of MHA; the other variants' sizes follow.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Feed-forward width of the baseline.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts per layer, a mixture in place of the FFN.")] = None,
    experts_per_token: Annotated[int | None, typer.Option(help="Experts that a token takes.")] = None,
    expert_size: Annotated[int | None, typer.Option(help="Width of each expert.")] = None,
    shared_expert_size: Annotated[int | None, typer.Option(help="Width of the expert that all tokens take.")] = None,
    match: Annotated[str | None, typer.Option(help="parameters: equal totals; none: equal feed-forward.")] = None,
    position: Annotated[str | None, typer.Option(help="rope, alibi or none.")] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Base of the rotary frequencies.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per training sequence.")] = None,
    max_positions: Annotated[int | None, typer.Option(help="Positions of the model; default: the context.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps per run.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the cosine schedule.")] = None,
    warmup_fraction: Annotated[float | None, typer.Option(help="Share of the steps that warm up.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Validation points per run.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    latent_scaling: Annotated[bool | None, typer.Option(help="Scale low-rank latents by sqrt(H/rank).")] = None,
    zero_init_output: Annotated[bool | None, typer.Option(help="Start attention outputs at zero.")] = None,
    depth_scaled_init: Annotated[bool | None, typer.Option(help="Paper's 1/sqrt(2 layer) rule.")] = None,
    initializer_range: Annotated[float | None, typer.Option(help="Initial std; default: 1/sqrt(hidden size).")] = None,
    tie_embeddings: Annotated[bool | None, typer.Option(help="One matrix for embedding and head.")] = None,
    launcher: Annotated[
        str | None, typer.Option(help="in-process, local (a process per run) or ray; default: local for several GPUs.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Runs at once; default: one per GPU, or 1.")] = None,
    out: Annotated[str | None, typer.Option(help="Run directory; default: runs/PRESET or runs/compare.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Read the text, match the sizes, print them, stop.")] = False,
) -> None:
    """Train every variant under one protocol.

    What does each byte of cache buy? The same command again resumes, and retries runs that failed; more variants or
    seeds extend a comparison. Exit status: 0 all done, 1 some failed, 2 wrong input, 130 Ctrl-C, 75 SIGTERM.
    """
    from multimatrix.compare.command import run_command

    settings = {
        "variants": split_labels(variants) if variants is not None else None,
        "seeds": whole_numbers("--seeds", seeds) if seeds is not None else None,
        "sizes": sizes or None,
        "data": data or None,
        "tokenizer": tokenizer,
        "validation_fraction": validation_fraction,
        "validation_tokens": validation_tokens,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "num_experts": experts,
        "experts_per_token": experts_per_token,
        "expert_size": expert_size,
        "shared_expert_size": shared_expert_size,
        "match": match,
        "position": position,
        "rope_theta": rope_theta,
        "context": context,
        "max_position_embeddings": max_positions,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup_fraction": warmup_fraction,
        "weight_decay": weight_decay,
        "evaluations": evaluations,
        "precision": precision,
        "latent_scaling": latent_scaling,
        "zero_init_output": zero_init_output,
        "depth_scaled_init": depth_scaled_init,
        "initializer_range": initializer_range,
        "tie_word_embeddings": tie_embeddings,
    }
    folder = out or f"runs/{preset or 'compare'}"
    raise typer.Exit(run_command(preset, settings, folder, launcher=launcher, workers=workers, dry_run=dry_run))
