"""lm-evaluation-harness tasks that read their rows from local files.

Prompts, few-shot examples, metrics and versions are those of the installed lm-eval: its own task is built, and only
where its rows come from is changed. A `Source` says which files stand for a data set of the hub, and turns one of
their rows into the columns that data set has.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from multimatrix.data.corpus import read_rows
from multimatrix.errors import InputError, one_line

Row = dict[str, Any]
ENDINGS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Source:
    """Local files that stand for one data set of the hub.

    Attributes:
        files: split of the data set -> name of the file that holds it, without its ending; alternatives by "|".
            The first split is the one that is evaluated; the others, which few-shot examples come from, may be absent.
        rows: how many rows the evaluated split has on the hub.
        columns: a local row -> the row of the hub; KeyError where a field is missing.
        part: where one file holds several configurations of the data set, the field that names them.
        difference: rows -> what in them makes the score another one, beside their number; "" if nothing does.
    """

    files: dict[str, str]
    rows: int
    columns: Callable[[Row], Row]
    part: str | None = None
    difference: Callable[[list[Row]], str] = lambda rows: ""


def _same(*names: str) -> Callable[[Row], Row]:
    """The fields are the columns."""
    return lambda row: {name: row[name] for name in names}


def _hellaswag(row: Row) -> Row:
    columns = _same("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type")
    return columns(row) | {"label": str(row["label"])}


def _boolq(row: Row) -> Row:
    """SuperGLUE puts the title before the passage; BoolQ itself keeps it apart."""
    passage = f"{row['title']} -- {row['passage']}"
    return {"question": row["question"], "passage": passage, "label": int(row["answer"])}


def _siqa(row: Row) -> Row:
    columns = _same("context", "question", "answerA", "answerB", "answerC")
    return columns(row) | {"label": str("ABC".index(row["correct"]) + 1)}


def _sciq(row: Row) -> Row:
    columns = _same("question", "distractor1", "distractor2", "distractor3", "correct_answer")
    return columns(row) | {"support": row.get("support", "")}


def _sciq_difference(rows: list[Row]) -> str:
    if any(row.get("support") for row in rows):
        return ""
    return "the rows have no support paragraph, so the prompt is the question alone"


def _choices(row: Row) -> Row:
    choices = row["question"]["choices"]
    lists = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    return {"id": row["id"], "choices": lists, "answerKey": row["answerKey"]}


def _arc(name: str, rows: int) -> Source:
    return Source(
        {"test": f"{name}_test", "train": f"{name}_train", "validation": f"{name}_dev"},
        rows,
        lambda row: _choices(row) | {"question": row["question"]["stem"]},
    )


# dataset_path and dataset_name of lm-eval's task, None for any name -> the files that stand for it.
SOURCES: dict[tuple[str, str | None], Source] = {
    ("SaylorTwift/bbh", None): Source({"test": "bbh"}, 6511, _same("input", "target"), part="task"),
    ("cais/mmlu", None): Source(
        {"test": "mmlu_test", "dev": "mmlu_dev"}, 14042, _same("question", "subject", "choices", "answer"), "subject"
    ),
    ("Rowan/hellaswag", None): Source(
        {"validation": "hellaswag_val|hellaswag_val_1000", "train": "hellaswag_train"}, 10042, _hellaswag
    ),
    ("allenai/winogrande", "winogrande_xl"): Source(
        {"validation": "winogrande_dev", "train": "winogrande_train"},
        1267,
        _same("sentence", "option1", "option2", "answer"),
    ),
    ("aps/super_glue", "boolq"): Source({"validation": "boolq_dev", "train": "boolq_train"}, 3270, _boolq),
    ("baber/piqa", None): Source(
        {"validation": "piqa_valid", "train": "piqa_train"}, 1838, _same("goal", "sol1", "sol2", "label")
    ),
    ("lighteval/siqa", None): Source({"validation": "siqa_dev", "train": "siqa_train"}, 1954, _siqa),
    ("allenai/sciq", None): Source(
        {"test": "sciq_test", "train": "sciq_train"}, 1000, _sciq, difference=_sciq_difference
    ),
    ("allenai/openbookqa", "main"): Source(
        {"test": "openbookqa_test", "train": "openbookqa_train", "validation": "openbookqa_dev"},
        500,
        lambda row: _choices(row) | {"question_stem": row["question"]["stem"]},
    ),
    ("allenai/ai2_arc", "ARC-Easy"): _arc("arc_easy", 2376),
    ("allenai/ai2_arc", "ARC-Challenge"): _arc("arc_challenge", 1172),
    ("EleutherAI/lambada_openai", "default"): Source({"test": "lambada_test"}, 5153, _same("text")),
    ("HuggingFaceH4/MATH-500", None): Source({"test": "math500_test"}, 500, _same("problem", "solution", "answer")),
}


@dataclass(frozen=True)
class Known:
    """What a name means: lm-eval's task or group, the folder of its definition, and the key of its `Source`."""

    task: str
    folder: str
    data_set: tuple[str, str | None]


# The benchmarks of the MFA paper and a few more, as a user may type them.
NAMES: dict[str, Known] = {
    "bbh": Known("bbh", "bbh/cot_fewshot", ("SaylorTwift/bbh", None)),
    "mmlu": Known("mmlu", "mmlu/default", ("cais/mmlu", None)),
    "hellaswag": Known("hellaswag", "hellaswag", ("Rowan/hellaswag", None)),
    "winogrande": Known("winogrande", "winogrande", ("allenai/winogrande", "winogrande_xl")),
    "boolq": Known("boolq", "super_glue/boolq", ("aps/super_glue", "boolq")),
    "piqa": Known("piqa", "piqa", ("baber/piqa", None)),
    "siqa": Known("social_iqa", "siqa", ("lighteval/siqa", None)),
    "sciq": Known("sciq", "sciq", ("allenai/sciq", None)),
    "openbookqa": Known("openbookqa", "openbookqa", ("allenai/openbookqa", "main")),
    "arc_easy": Known("arc_easy", "arc", ("allenai/ai2_arc", "ARC-Easy")),
    "arc_challenge": Known("arc_challenge", "arc", ("allenai/ai2_arc", "ARC-Challenge")),
    "lambada": Known("lambada_openai", "lambada", ("EleutherAI/lambada_openai", "default")),
    "math500": Known("minerva_math500", "minerva_math", ("HuggingFaceH4/MATH-500", None)),
    "hendrycks_math500": Known("hendrycks_math500", "hendrycks_math", ("HuggingFaceH4/MATH-500", None)),
}


class LocalRows:
    """The files of one folder, each read once.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"the data folder {folder} does not exist; give one that holds files as piqa_valid.jsonl")
        self.read = functools.cache(_rows_and_hash)

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """Until the end of the block, let tasks that are built read this folder where it stands for their data set.

        lm-eval passes settings down to the members of its groups, but not where their rows come from.
        """
        download = ConfigurableTask.download

        def download_or_read(task: ConfigurableTask, dataset_kwargs: Row | None = None, **kwargs: Any) -> None:
            source = SOURCES.get((task.DATASET_PATH, task.DATASET_NAME)) or SOURCES.get((task.DATASET_PATH, None))
            if source is None:
                download(task, dataset_kwargs, **kwargs)
            else:
                self.fill(task, source)

        ConfigurableTask.download = download_or_read
        try:
            yield
        finally:
            ConfigurableTask.download = download

    def fill(self, task: ConfigurableTask, source: Source) -> None:
        """Give a task its rows, and note on it what was read (`local_files`) and what differs (`differences`).

        Raises:
            InputError: a file is missing or holds something else.
        """
        files = {split: path for split, names in source.files.items() if (path := self._find(names))}
        evaluated = next(iter(source.files))
        if evaluated not in files:
            wanted = " or ".join(f"{name}.jsonl" for name in source.files[evaluated].split("|"))
            raise InputError(
                f"{self.folder} has no {wanted} (or .jsonl.gz), which the task {task.config.task} reads; "
                "put it there, or leave out the data folder to let lm-eval fetch the rows"
            )
        task.dataset = datasets.DatasetDict(
            {split: datasets.Dataset.from_list(self._columns(path, task, source)) for split, path in files.items()}
        )
        for split in ("training_split", "validation_split"):
            if getattr(task.config, split) not in files:
                setattr(task.config, split, None)
        task.local_files = {path.name: self.read(path)[1] for path in files.values()}
        rows, _ = self.read(files[evaluated])
        task.differences = [difference] if (difference := source.difference(rows)) else []
        if len(rows) != source.rows:
            task.differences.append(f"{len(rows):,} of the {source.rows:,} rows that the hub has")

    def _find(self, names: str) -> Path | None:
        paths = (self.folder / f"{name}{ending}" for name in names.split("|") for ending in ENDINGS)
        return next((path for path in paths if path.is_file()), None)

    def _columns(self, path: Path, task: ConfigurableTask, source: Source) -> list[Row]:
        rows, _ = self.read(path)
        name = f"the task {task.config.task}"
        if source.part is not None:
            rows = [row for row in rows if row.get(source.part) == task.DATASET_NAME]
        if not rows:
            part = f" whose {source.part} is {task.DATASET_NAME!r}" if source.part else ""
            raise InputError(f"{path} has no rows{part}, which {name} needs; add them")
        try:
            return [source.columns(row) for row in rows]
        except KeyError as error:
            raise InputError(f"a row of {path} has no field {error}, which {name} needs; add it") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"a row of {path} is not as {name} needs it: {one_line(error)}") from error


def _rows_and_hash(path: Path) -> tuple[list[Row], str]:
    """Rows of a .jsonl or .jsonl.gz file, and the sha256 of the file."""
    return [row for _, row in read_rows(path)], hashlib.sha256(path.read_bytes()).hexdigest()
