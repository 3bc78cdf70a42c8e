"""`multimatrix evaluate`, from settings to results as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from multimatrix.data.corpus import read_documents
from multimatrix.environment import command_line, environment
from multimatrix.evaluate import loading
from multimatrix.evaluate.perplexity import cut, perplexity


def evaluate_folder(
    folder: str,
    *,
    tasks: Sequence[str] = (),
    task_settings: dict[str, Any],
    texts: Sequence[str] = (),
    stride: int | None = None,
    max_bytes: int | None = None,
    context: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score the model in `folder` on `tasks`, with the settings of `harness.run_tasks`, and on `texts`.

    texts: files and folders, as `data.read_documents` takes them; the first `max_bytes` bytes of them are scored.
    stride: None for half the context. context: tokens the model may see, None for its positions. dtype: None for the
    one the weights are stored in.

    Raises:
        InputError: a text, the model, a task or a setting that cannot be used.
    """
    if texts:  # before the model is loaded: a wrong name shall not cost minutes
        name, documents = read_documents(texts)
        documents = documents if max_bytes is None else cut(documents, max_bytes)
    model, tokenizer = loading.load(folder, dtype, device)
    context = loading.context_of(model, context)
    results: dict[str, Any] = {
        "command": command_line(),
        "model": {
            "folder": folder,
            "model_type": model.config.model_type,
            "attention": getattr(model.config, "attention", None),
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_position_embeddings": loading.positions(model),
            "context": context,
        },
        "environment": environment(model.device),
    }
    if tasks:
        from multimatrix.evaluate.harness import run_tasks  # lm-eval is an extra

        results["tasks"] = run_tasks(model, tokenizer, tasks, context=context, batch_size=batch_size, **task_settings)
    if texts:
        stride = stride if stride is not None else max(context // 2, 1)
        scored = perplexity(model, tokenizer, documents, context=context, stride=stride, batch_size=batch_size)
        results["perplexity"] = {"text": name, "max_bytes": max_bytes, **dataclasses.asdict(scored)}
    return results
