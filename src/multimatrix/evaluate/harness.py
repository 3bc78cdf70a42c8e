"""lm-evaluation-harness on a loaded model: benchmarks with the settings that make a score comparable.

Everything that decides a score is lm-eval's own; `evaluate.tasks` says where rows come from, and
`evaluate.task_loading` what settings do.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from numbers import Real
from typing import Any

import datasets
import lm_eval
import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from multimatrix.errors import InputError
from multimatrix.evaluate.task_loading import configure, leaves, load_tasks, name_of

# Resamples behind the standard error of a metric that has no formula for it, such as LAMBADA's perplexity.
BOOTSTRAP = 1000
# lm-eval's own seeds.
SEEDS = {
    "python": DEFAULT_RANDOM_SEED,
    "numpy": DEFAULT_OTHER_SEED,
    "torch": DEFAULT_OTHER_SEED,
    "fewshot": DEFAULT_OTHER_SEED,
}


class LocalLM(HFLM):
    """lm-eval's model around a loaded one; counts its requests, and those that lose tokens on the left.

    An answer that is longer than the context is an InputError; lm-eval would fail on it.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: int, batch_size: int
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", max_length=context, batch_size=batch_size
        )
        self.requests = 0
        self.truncated = 0

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        self.requests += len(requests)
        self.truncated += sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests)
        longest = max((len(after) for *_, after in requests), default=0)
        if longest > self.max_length:
            raise InputError(
                f"an answer of the tasks has {longest} tokens and the context {self.max_length}; "
                f"give --context {longest} or more, if the model can see that far"
            )
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(
        self, strings: Any, padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[Tensor, Tensor]:
        # Cut here, not there, so that what is cut is counted.
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is None:
            return ids, mask
        self.requests += len(ids)
        self.truncated += int((mask.sum(-1) > left_truncate_len).sum())
        return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    names: Sequence[str],
    *,
    context: int,
    data_dir: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    seed: int | None = None,
) -> dict[str, Any]:
    """Scores of a model, and everything they depend on, ready to be written as JSON.

    Args:
        names: of `NAMES`, or any task, group or tag that lm-eval knows.
        context: tokens the model may see; longer prompts lose their beginning.
        data_dir: folder with the rows; None lets lm-eval fetch them.
        limit: first rows of each task, and of each subtask of a group.
        num_fewshot: examples before each question; None for lm-eval's own number.
        max_new_tokens: of tasks that generate; None for lm-eval's own number.
        seed: of everything random; None for lm-eval's defaults.

    Raises:
        InputError: a task is unknown, cannot be loaded, or cannot be run with these settings.
    """
    seeds = dict(SEEDS) if seed is None else dict.fromkeys(SEEDS, seed)
    with _quiet():
        manager, chosen = load_tasks(names, data_dir)
        lm = LocalLM(model, tokenizer, context, batch_size)
        for task in (task for item in chosen for task in leaves(item)):
            configure(task, lm, num_fewshot, max_new_tokens)
            task.set_fewshot_seed(seeds["fewshot"])
        random.seed(seeds["python"])
        np.random.seed(seeds["numpy"])  # noqa: NPY002, the generator that lm-eval draws from
        torch.manual_seed(seeds["torch"])
        found = lm_eval.evaluate(
            lm=lm,
            task_dict=manager.load(chosen),
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    return {
        "settings": {
            "lm_eval": metadata.version("lm_eval"),
            "limit": limit,
            "num_fewshot": num_fewshot,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "context": context,
            "data_dir": data_dir,
            "seeds": seeds,
        },
        "requests": lm.requests,
        "truncated_requests": lm.truncated,
        "scores": {name_of(item): _score(item, found) for item in chosen},
    }


def _score(item: Task | Group, found: dict[str, Any]) -> dict[str, Any]:
    """One task's or group's entry in the results."""
    group, name, tasks = isinstance(item, Group), name_of(item), leaves(item)
    counts = [found["n-samples"][task.task_name] for task in tasks]
    shots = {found["n-shot"][task.task_name] for task in tasks}
    files: dict[str, str] = {}
    differences: list[str] = []
    for task in tasks:
        files |= getattr(task, "local_files", {})
        differences += [text for text in getattr(task, "differences", []) if text not in differences]
    entry = {
        "version": found["versions"].get(name),
        "num_fewshot": shots.pop() if len(shots) == 1 else sorted(shots),
        "rows": sum(count["effective"] for count in counts),
        "rows_available": sum(count["original"] for count in counts),
        "data_set": getattr(tasks[0], "DATASET_PATH", None),
        "data": "local files" if files else "lm-eval's own",
        "files_sha256": files,
        "differences": differences,
        "metrics": _metrics(found["groups" if group else "results"][name], found["higher_is_better"].get(name, {})),
    }
    if group:
        entry["subtasks"] = {task.task_name: _score(task, found) for task in tasks}
    return entry


def _metrics(numbers: dict[str, Any], higher_is_better: dict[str, bool]) -> list[dict[str, Any]]:
    """lm-eval writes "acc,none" and "acc_stderr,none"."""
    rows = []
    for key, value in numbers.items():
        metric, comma, filter_ = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            rows.append(
                {
                    "metric": metric,
                    "filter": filter_,
                    "value": _finite(value),
                    "stderr": _finite(numbers.get(f"{metric}_stderr,{filter_}")),
                    "higher_is_better": higher_is_better.get(metric),
                }
            )
    return rows


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Errors only from lm-eval, its prints to stderr, no bars from datasets, and no processes for a bootstrap."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        del os.environ["DISABLE_MULTIPROC"]
        datasets.enable_progress_bars()
        logger.setLevel(level)
