"""lm-evaluation-harness' tasks by name, with the settings that were asked for."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from multimatrix.errors import InputError, one_line
from multimatrix.evaluate.tasks import NAMES, LocalRows


def load_tasks(names: Sequence[str], data_dir: str | None) -> tuple[TaskManager, list[Task | Group]]:
    """What lm-eval calls by these names: a task, a group, or the tasks of a tag; rows from `data_dir` if given.

    Raises:
        InputError: a name is unknown or given twice, or a task cannot be loaded.
    """
    root = Path(lm_eval.tasks.__file__).parent
    folders = sorted({root / known.folder for known in NAMES.values()})
    manager = TaskManager(include_defaults=False, include_path=folders)
    wanted = [NAMES[name].task if name in NAMES else name for name in names]
    if not set(wanted) <= set(manager.all_tasks):
        manager = TaskManager()  # reads ten thousand task files, which takes seconds
    for name in wanted:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, {*NAMES, *manager.all_tasks}, n=3)
            meant = f"did you mean {' or '.join(near)}?" if near else "--tasks list shows some"
            raise InputError(f"lm-eval {metadata.version('lm_eval')} knows no task {name!r}; {meant}")
    rows = LocalRows(data_dir).serve() if data_dir is not None else contextlib.nullcontext()
    with rows:
        chosen = [item for name in wanted for item in _load(manager, name)]
    seen = [task.task_name for item in chosen for task in leaves(item)]
    if twice := sorted({name for name in seen if seen.count(name) > 1} or {n for n in wanted if wanted.count(n) > 1}):
        raise InputError(f"the task {twice[0]} is asked for more than once; name it once")
    return manager, chosen


def _load(manager: TaskManager, name: str) -> list[Task | Group]:
    try:
        loaded = manager.load(name)
    except InputError:
        raise
    except (ImportError, AssertionError) as error:  # how a task says that it needs another package
        raise InputError(
            f"lm-eval's task {name} needs a package that is not installed: {one_line(error).partition('. ')[0]}; "
            "pip install 'multimatrix[lm-eval]' brings those of all tasks that --tasks list shows"
        ) from error
    except Exception as error:  # the hub, a file, a template: each raises in its way
        raise InputError(
            f"lm-eval's task {name} cannot be loaded: {one_line(error)}; its rows come from the hub "
            "unless --data-dir holds them"
        ) from error
    if name in loaded["groups"]:
        return [loaded["groups"][name]]
    return list(loaded["tasks"].values())


def name_of(item: Task | Group) -> str:
    """As lm-eval's results call it."""
    return item.name if isinstance(item, Group) else item.task_name


def leaves(item: Task | Group) -> list[Task]:
    """The tasks of a group, or the one task."""
    return item.get_all_tasks() if isinstance(item, Group) else [item]


def configure(task: Task, lm: TemplateLM, num_fewshot: int | None, max_new_tokens: int | None) -> None:
    """Set what was asked for, by lm-eval's rules: a task that has 0 examples of its own keeps 0.

    lm: the model, for the tokens that it sees and writes at most.

    Raises:
        InputError: lm-eval would only fail on it after the first requests have run, or quietly do something else.
    """
    own = task.config.num_fewshot
    shots = own or 0 if num_fewshot is None or own == 0 else num_fewshot
    task.set_config("num_fewshot", shots)
    if shots:
        _check_examples(task, shots)
    if task.OUTPUT_TYPE == "generate_until":
        _set_new_tokens(task, lm, max_new_tokens)


def _check_examples(task: Task, shots: int) -> None:
    """InputError where there are not so many rows for examples; a note where they are others than lm-eval's."""
    config, name = task.config, task.task_name
    evaluated = config.test_split or config.validation_split
    fixed = task.fewshot_cfg.samples is not None
    split = task.fewshot_cfg.split or config.training_split or config.validation_split or config.test_split
    if hasattr(task, "local_files") and not fixed:
        if split not in task.dataset or split == evaluated:
            raise InputError(
                f"the data folder has no rows that the {shots} examples of {name} can come from; "
                "put the training rows there or give --num-fewshot 0"
            )
        if split != task.fewshot_cfg.split and split != "train":
            task.differences.append(f"the {shots} examples come from the {split} rows, with lm-eval from train")
    if shots > (available := len(list(task.fewshot_docs()))):
        raise InputError(f"{name} has {available} rows for examples; give --num-fewshot of at most {available}")


def _set_new_tokens(task: Task, lm: TemplateLM, max_new_tokens: int | None) -> None:
    """Bound what is generated; InputError where the bound leaves no token of the context for the prompt."""
    own_tokens = task.config.generation_kwargs.get("max_gen_toks", lm.max_gen_toks)
    tokens = max_new_tokens or own_tokens
    if tokens >= lm.max_length:
        raise InputError(
            f"{task.task_name} generates up to {tokens} tokens and the context is {lm.max_length}; "
            f"give --max-new-tokens below {lm.max_length} or a larger --context"
        )
    task.set_config("generation_kwargs", {"max_gen_toks": tokens}, update=True)
    if tokens != own_tokens and hasattr(task, "differences"):
        task.differences.append(f"at most {tokens} tokens are generated, with lm-eval {own_tokens}")
