"""`multimatrix generate`: text from a saved model, and how fast it came."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from multimatrix.cli.options import check_device, quiet_transformers, torch_dtype
from multimatrix.errors import InputError


def generate(
    model: Annotated[str, typer.Argument(help="Folder of a saved model with its tokenizer.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from the input.")] = "-",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the sampling.")] = 0,
    attention: Annotated[str, typer.Option(help="auto, triton (the decode kernel), sdpa or eager.")] = "auto",
    graph: Annotated[bool, typer.Option(help="Capture the decode step in a CUDA graph, on a GPU.")] = True,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float64, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
) -> None:
    """Continue a text, streamed to the output; tokens/s and GB/s read come last, on stderr."""
    names = {"auto": "sdpa", "triton": "multimatrix_triton", "sdpa": "multimatrix_sdpa", "eager": "eager"}
    if attention not in names:
        raise InputError(f"--attention must be one of {', '.join(names)}; got {attention!r}")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p must be above 0 and at most 1, got {top_p}")
    precision = None if dtype == "auto" else torch_dtype(dtype)
    check_device(device)
    quiet_transformers()
    text = sys.stdin.read() if prompt == "-" else prompt

    from multimatrix.generate.command import generate_text

    for piece in generate_text(
        model,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        attn_implementation=names[attention],
        graph=graph,
        dtype=precision,
        device=device,
        report=lambda line: print(line, file=sys.stderr),
    ):
        print(piece, end="", flush=True)
    print(flush=True)
