"""Tasks on local rows against lm-eval's own tasks on the rows of the hub, and scores against sums by hand."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
from pathlib import Path
from statistics import stdev

import datasets
import numpy as np
import pytest
import torch

from cases import DECODERS, random_model
from command import multimatrix
from multimatrix.data import load_tokenizer
from multimatrix.errors import InputError

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm-eval", allow_module_level=True)

from lm_eval.api.instance import Instance

from multimatrix.evaluate.harness import LocalLM, run_tasks
from multimatrix.evaluate.task_loading import load_tasks
from multimatrix.evaluate.tasks import NAMES, SOURCES

BENCH = Path(__file__).parents[2] / "shared" / "data" / "bench"
needs_bench = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the benchmark files")
MATH = [importlib.util.find_spec(name) for name in ("math_verify", "antlr4")]
needs_math = pytest.mark.skipif(None in MATH, reason="needs lm-eval[math]")


def ai2(key: str, stem: str, texts: list[str], answer: str, labels: str = "ABCD") -> dict:
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=False)]
    return {"id": key, "question": {"stem": stem, "choices": choices}, "answerKey": answer}


def hub_ai2(name: str):
    """Local row -> hub row whose question is called `name`."""
    return lambda row: {
        "id": row["id"],
        name: row["question"]["stem"],
        "choices": {
            "text": [choice["text"] for choice in row["question"]["choices"]],
            "label": [choice["label"] for choice in row["question"]["choices"]],
        },
        "answerKey": row["answerKey"],
    }


# Three rows of each benchmark as its local file has them.
ROWS: dict[str, list[dict]] = {
    "piqa_valid": [
        {"goal": "open a jar", "sol1": "twist the lid", "sol2": "eat the lid", "label": 0},
        {"goal": "dry a cup", "sol1": "put it into the well", "sol2": "use a towel", "label": 1},
        {"goal": "naïve é", "sol1": "é", "sol2": "long answer without end", "label": 1},
    ],
    "hellaswag_val": [
        {
            "ind": i,
            "activity_label": "Pole vault",
            "ctx_a": "A man runs.",
            "ctx_b": "a few women",
            "ctx": "A man runs. a few women",
            "split": "val",
            "split_type": "indomain",
            "label": i,
            "endings": ["fall [title] down.", "watch  him.", "swim.", "sing [step] loud."],
            "source_id": f"a~{i}",
        }
        for i in range(3)
    ],
    "winogrande_dev": [
        {"qID": "1", "sentence": "Sarah beat Maria so _ won.", "option1": "Sarah", "option2": "Maria", "answer": "1"},
        {
            "qID": "2",
            "sentence": "Sarah beat Maria so _ lost it.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "2",
        },
        {"qID": "3", "sentence": "The _ was hot, not the tea.", "option1": "tea", "option2": "milk", "answer": "2"},
    ],
    "boolq_dev": [
        {"question": "is it wet", "title": "Rain", "answer": True, "passage": "Rain is water."},
        {"question": "is it dry", "title": "Rain (song)", "answer": False, "passage": "Rain is a song."},
        {"question": "is it blue", "title": "Sky", "answer": True, "passage": "The sky is."},
    ],
    "siqa_dev": [
        {
            "context": "Tracy ran.",
            "question": "Why?",
            "answerA": "fun",
            "answerB": "fear",
            "answerC": "no reason",
            "correct": correct,
        }
        for correct in "CAB"
    ],
    "sciq_test": [
        {
            "question": "What rises?",
            "distractor3": "stone",
            "distractor1": "lead",
            "distractor2": "iron",
            "correct_answer": word,
        }
        for word in ("smoke", "steam", "air")
    ],
    "openbookqa_test": [
        ai2(f"o{i}", "The sun is", ["hot", "cold", "wet", "far"], answer) for i, answer in enumerate("ADC")
    ],
    "arc_easy_test": [
        ai2("e1", "What is water?", ["wet", "dry", "red", "old"], "A"),
        ai2("e2", "What is fire?", ["wet", "hot", "red"], "2", labels="1234"),
        ai2("e3", "What is ice?", ["cold", "hot", "red", "new", "big"], "E", labels="ABCDE"),
    ],
    "arc_challenge_test": [ai2(f"c{i}", "Who?", ["I", "you", "he", "we"], answer) for i, answer in enumerate("BCA")],
    "lambada_test": [
        {"text": "He saw a fox and gave it to the hen"},
        {"text": "She said, \"I don't care about signs"},
        {"text": "two words"},
    ],
    "math500_test": [
        {
            "problem": f"What is {i} + 1?",
            "solution": f"It is $\\boxed{{{i + 1}}}$.",
            "answer": str(i + 1),
            "subject": "Algebra",
            "level": 1,
        }
        for i in range(3)
    ],
}
# Name -> file, split on the hub, and the row there, written from the hub's own description of its columns.
HUB = {
    "piqa": ("piqa_valid", "validation", dict),
    "hellaswag": ("hellaswag_val", "validation", lambda row: {**row, "label": f"{row['label']}"}),
    "winogrande": ("winogrande_dev", "validation", lambda row: {k: v for k, v in row.items() if k != "qID"}),
    "boolq": (
        "boolq_dev",
        "validation",
        lambda row: {
            "question": row["question"],
            "passage": row["title"] + " -- " + row["passage"],
            "idx": 7,
            "label": 1 if row["answer"] else 0,
        },
    ),
    "siqa": (
        "siqa_dev",
        "validation",
        lambda row: {
            **{key: row[key] for key in ("context", "question", "answerA", "answerB", "answerC")},
            "label": {"A": "1", "B": "2", "C": "3"}[row["correct"]],
        },
    ),
    "sciq": ("sciq_test", "test", lambda row: {**row, "support": ""}),
    "openbookqa": ("openbookqa_test", "test", hub_ai2("question_stem")),
    "arc_easy": ("arc_easy_test", "test", hub_ai2("question")),
    "arc_challenge": ("arc_challenge_test", "test", hub_ai2("question")),
    "lambada": ("lambada_test", "test", lambda row: {**row, "domain": None}),
    "math500": ("math500_test", "test", lambda row: {**row, "unique_id": "test/1"}),
    "hendrycks_math500": ("math500_test", "test", lambda row: {**row, "unique_id": "test/1"}),
}
PLAIN = [pytest.param(name, marks=needs_math if name == "math500" else ()) for name in HUB]
# The requests of the first row, by hand from the task's description: context and continuation of every choice.
BY_HAND = {
    "piqa": [("Question: open a jar\nAnswer:", " twist the lid"), ("Question: open a jar\nAnswer:", " eat the lid")],
    "hellaswag": [
        ("Pole vault: A man runs. A few women", ending)
        for ending in (" fall. down.", " watch him.", " swim.", " sing loud.")
    ],
    "winogrande": [("Sarah beat Maria so Sarah", " won."), ("Sarah beat Maria so Maria", " won.")],
    "boolq": [("Rain -- Rain is water.\nQuestion: is it wet?\nAnswer:", answer) for answer in (" no", " yes")],
    "siqa": [("Q: Tracy ran. Why?\nA:", answer) for answer in (" fun", " fear", " no reason")],
    "sciq": [("\nQuestion: What rises?\nAnswer:", answer) for answer in (" lead", " iron", " stone", " smoke")],
    "openbookqa": [("The sun is", answer) for answer in (" hot", " cold", " wet", " far")],
    "arc_easy": [("Question: What is water?\nAnswer:", answer) for answer in (" wet", " dry", " red", " old")],
    "arc_challenge": [("Question: Who?\nAnswer:", answer) for answer in (" I", " you", " he", " we")],
    "lambada": [("He saw a fox and gave it to the", " hen")],
    "hendrycks_math500": [
        ("Problem: What is 0 + 1?\nAnswer:", {"until": ["Problem:"], "do_sample": False, "temperature": 0.0})
    ],
}


def write(folder: Path, name: str, rows: list[dict], ending: str = ".jsonl") -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / f"{name}{ending}").write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)


def parts(prefix: str) -> dict[str, str]:
    """lm-eval's subtasks of MMLU or BBH -> the configuration of the data set that each reads."""
    manager, _ = load_tasks([], None)
    index = manager.task_index
    return {name: index[name].cfg["dataset_name"] for name in manager.all_subtasks if name.startswith(prefix)}


MMLU, BBH = parts("mmlu_"), parts("bbh_cot_fewshot_")


def mmlu_rows(count: int, what: str) -> list[dict]:
    """More rows for the first subject than for the others, so that weights show."""
    return [
        {"question": f"{what} {i} of {subject}? ", "subject": subject, "choices": ["1", "2", "3", "4"], "answer": i % 4}
        for subject in sorted(MMLU.values())
        for i in range(count + 2 * (subject == "anatomy"))
    ]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """A data folder of three rows a task, some packed; no training rows."""
    folder = tmp_path_factory.mktemp("bench")
    for i, (name, rows) in enumerate(ROWS.items()):
        write(folder, name, rows, (".jsonl", ".jsonl.gz")[i % 2])
    write(folder, "mmlu_test", mmlu_rows(1, "Test"))
    write(folder, "mmlu_dev", mmlu_rows(5, "Shot"))
    tasks = [{"task": task, "input": f"Question {i}", "target": f"({i})"} for task in BBH.values() for i in range(2)]
    write(folder, "bbh", tasks, ".jsonl.gz")
    return folder


def own_tasks(monkeypatch, name: str, splits) -> list:
    """lm-eval's own tasks of this name; splits: configuration of the data set -> split -> rows of the hub."""

    def load_dataset(path: str, name: str | None = None, **kwargs):
        rows = splits(name)
        return datasets.DatasetDict({split: datasets.Dataset.from_list(found) for split, found in rows.items()})

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        return leaves(load_tasks([name], None)[1])


def leaves(chosen: list) -> list:
    """In the order of their names."""
    found = [task for item in chosen for task in (item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item])]
    return sorted(found, key=lambda task: task.task_name)


def rendered(task, limit: int | None = None, num_fewshot: int | None = None) -> dict:
    """Everything about a task that decides its score."""
    shots = task.config.num_fewshot or 0 if num_fewshot is None else num_fewshot
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit)
    docs = list(task.eval_docs)[:limit]
    return {
        "name": task.task_name,
        "version": task.VERSION,
        "num_fewshot": shots,
        "output_type": task.OUTPUT_TYPE,
        "requests": [(request.request_type, request.args, request.doc_id, request.idx) for request in task.instances],
        "targets": [task.doc_to_target(doc) for doc in docs],
        "choices": [task.doc_to_choice(doc) for doc in docs] if task.config.doc_to_choice else None,
        "metrics": task.config.metric_list,
        "aggregation": task.aggregation(),
        "higher_is_better": task.higher_is_better(),
        "filters": task.config.filter_list,
        "process_results": task.config.process_results,
        "generation": task.config.generation_kwargs,
    }


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# Rendering


@pytest.mark.parametrize("name", PLAIN)
def test_rows_render_as_in_lm_eval(monkeypatch, bench, name) -> None:
    file, _, to_hub = HUB[name]
    rows = [to_hub(row) for row in ROWS[file]]
    # The hub has training rows, which lm-eval reads even for no examples.
    (own,) = own_tasks(monkeypatch, name, lambda config: {"train": rows, "validation": rows, "test": rows})
    (ours,) = leaves(load_tasks([name], str(bench))[1])
    found = rendered(ours)
    assert found == rendered(own)
    assert len(found["requests"]) == (sum(map(len, found["choices"])) if found["choices"] else 3)
    if name in BY_HAND:
        assert [request[1] for request in found["requests"] if request[2] == 0] == BY_HAND[name]


@pytest.mark.parametrize("name", [name for name in NAMES if "train" in SOURCES[NAMES[name].data_set].files])
def test_examples_render_as_in_lm_eval(monkeypatch, tmp_path, name) -> None:
    """Where the user puts the training rows into the data folder."""
    file, split, to_hub = HUB[name]
    train = list(reversed(ROWS[file])) * 3
    write(tmp_path, file, ROWS[file])
    write(tmp_path, SOURCES[NAMES[name].data_set].files["train"], train)
    splits = {split: [to_hub(row) for row in ROWS[file]], "train": [to_hub(row) for row in train]}
    (own,) = own_tasks(monkeypatch, name, lambda config: {"validation": splits["train"][:1], **splits})
    (ours,) = leaves(load_tasks([name], str(tmp_path))[1])
    found = rendered(ours, num_fewshot=2)
    assert found == rendered(own, num_fewshot=2)
    assert found["requests"][0][1][0].count("\n\n") == 2


@pytest.mark.parametrize("num_fewshot", [0, 5])
def test_mmlu_renders_as_in_lm_eval(monkeypatch, bench, num_fewshot) -> None:
    def splits(subject: str) -> dict:
        of = {"test": mmlu_rows(1, "Test"), "dev": mmlu_rows(5, "Shot")}
        return {split: [row for row in rows if row["subject"] == subject] for split, rows in of.items()}

    own, ours = own_tasks(monkeypatch, "mmlu", splits), leaves(load_tasks(["mmlu"], str(bench))[1])
    assert len(ours) == len(own) == 57
    for mine, theirs in zip(ours, own, strict=True):
        assert rendered(mine, None, num_fewshot) == rendered(theirs, None, num_fewshot)
    context, continuation = rendered(ours[1], None, num_fewshot)["requests"][0][1]
    assert context.startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
    shot = "Shot 0 of anatomy?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n"
    assert context.count("Shot ") == num_fewshot
    assert (shot in context) == (num_fewshot > 0)
    assert context.endswith("Test 0 of anatomy?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:")
    assert continuation == " A"


def test_bbh_renders_as_in_lm_eval(monkeypatch, bench) -> None:
    rows = [{"input": f"Question {i}", "target": f"({i})"} for i in range(2)]
    own, ours = own_tasks(monkeypatch, "bbh", lambda task: {"test": rows}), leaves(load_tasks(["bbh"], str(bench))[1])
    assert len(ours) == len(own) == 27
    for mine, theirs in zip(ours, own, strict=True):
        found = rendered(mine)
        assert found == rendered(theirs)
        context = found["requests"][0][1][0]
        assert context.count("A: Let's think step by step.\n") == 1 + found["num_fewshot"] == 4
        assert context.endswith("Q: Question 0\nA: Let's think step by step.\n")


@needs_bench
@pytest.mark.parametrize("name", PLAIN)
def test_real_rows_render_as_in_lm_eval(monkeypatch, name) -> None:
    file, split, to_hub = HUB[name]
    file = file.replace("hellaswag_val", "hellaswag_val_1000")
    rows = [to_hub(row) for row in read(BENCH / f"{file}.jsonl.gz")]
    splits = {split: rows, "train": rows[:1], **({} if split == "validation" else {"validation": rows[:1]})}
    (own,) = own_tasks(monkeypatch, name, lambda config: splits)
    (ours,) = leaves(load_tasks([name], str(BENCH))[1])
    assert len(ours.eval_docs) == len(own.eval_docs) == len(rows)
    assert rendered(ours, 50) == rendered(own, 50)


@needs_bench
def test_real_mmlu_and_bbh_render_as_in_lm_eval(monkeypatch) -> None:
    mmlu = {split: read(BENCH / f"mmlu_{split}.jsonl.gz") for split in ("test", "dev")}
    bbh = read(BENCH / "bbh.jsonl.gz")

    def splits(part: str) -> dict:
        if part in BBH.values():
            return {"test": [{"input": row["input"], "target": row["target"]} for row in bbh if row["task"] == part]}
        return {split: [row for row in rows if row["subject"] == part] for split, rows in mmlu.items()}

    for name, shots, count in (("mmlu", 5, 57), ("bbh", None, 27)):
        own, ours = own_tasks(monkeypatch, name, splits), leaves(load_tasks([name], str(BENCH))[1])
        assert len(ours) == count
        for mine, theirs in zip(ours, own, strict=True):
            assert rendered(mine, 2, shots) == rendered(theirs, 2, shots)
        assert sum(len(task.eval_docs) for task in ours) == {"mmlu": 14042, "bbh": 6511}[name]


@needs_bench
def test_the_examples_of_bbh_are_those_of_its_authors() -> None:
    prompts = {row["task"]: row["cot_prompt"] for row in read(BENCH / "bbh_cot_prompts.jsonl.gz")}
    for task in leaves(load_tasks(["bbh"], str(BENCH))[1]):
        flat = " ".join(prompts[task.DATASET_NAME].split())
        for shot in task.fewshot_docs():
            assert " ".join(shot["input"].split()) in flat
            assert " ".join(shot["target"].split()) in flat


def test_every_name_reads_local_rows(bench) -> None:
    """Fails when a new lm-eval moves a task to another data set."""
    for name in NAMES:
        if name == "math500" and None in MATH:
            continue
        for task in leaves(load_tasks([name], str(bench))[1]):
            assert task.local_files, task.task_name


# Scores


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes", [])


def decoder(name: str, **changes):
    torch.manual_seed(0)
    return random_model(DECODERS[name], **{"vocab_size": 257, "max_position_embeddings": 1024} | changes)


@torch.no_grad()
def by_hand(model, tokenizer, context: str, answer: str) -> tuple[float, bool]:
    """log p(answer | context) in nats, and whether greedy decoding would give the answer."""
    before, after = tokenizer.encode(context) or [tokenizer.bos_token_id], tokenizer.encode(answer)
    scores = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    total, greedy = 0.0, True
    for i, token in enumerate(after):
        row = scores[len(before) + i - 1]
        total += row[token].item()
        greedy &= row.argmax().item() == token
    return total, greedy


def requests(pairs: list[tuple], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in pairs]


@pytest.mark.parametrize("name", DECODERS)
def test_batch_size_changes_no_score(name: str, tokenizer) -> None:
    """Rows of many lengths: filled up on the right for likelihoods, on the left for generation."""
    model = decoder(name, max_position_embeddings=64)
    pairs = [
        ("a", " b"),
        ("a longer context, indeed", " answer"),
        ("", "x"),
        ("é" * 9, " naïve"),
        ("q" * 40, "rst" * 3),
    ]
    expected = [by_hand(model, tokenizer, *pair) for pair in pairs]
    prompts = [(context or "z", {"until": ["\n"], "max_gen_toks": 6}) for context, _ in pairs]
    written = []
    for batch_size in (1, 4):
        lm = LocalLM(model, tokenizer, 64, batch_size)
        found = lm.loglikelihood(requests(pairs), disable_tqdm=True)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-9)
        written.append(lm.generate_until(requests(prompts, "generate_until"), disable_tqdm=True))
        assert (lm.requests, lm.truncated) == (10, 0)
    assert written[0] == written[1]
    ids = torch.tensor([tokenizer.encode(prompts[1][0])])
    alone = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert written[0][1] == tokenizer.decode(alone, skip_special_tokens=True).split("\n")[0]


def test_scores_by_hand(bench, tokenizer) -> None:
    """acc, acc_norm (by characters) and their standard errors on PIQA; LAMBADA's perplexity and acc."""
    model = decoder("mfa_kr")
    found = run_tasks(model, tokenizer, ["piqa", "lambada"], context=1024, data_dir=str(bench), batch_size=2)
    right, right_norm = [], []
    for row in ROWS["piqa_valid"]:
        answers = [row["sol1"], row["sol2"]]
        nats = [by_hand(model, tokenizer, f"Question: {row['goal']}\nAnswer:", " " + text)[0] for text in answers]
        right.append(float(np.argmax(nats) == row["label"]))
        right_norm.append(
            float(np.argmax([n / len(text) for n, text in zip(nats, answers, strict=True)]) == row["label"])
        )
    assert right != right_norm, "choose rows that tell the two apart"
    piqa = found["scores"]["piqa"]
    for metric, values in zip(piqa["metrics"], (right, right_norm), strict=True):
        assert metric["value"] == pytest.approx(sum(values) / 3)
        assert metric["stderr"] == pytest.approx(stdev(values) / math.sqrt(3))
    assert [metric["metric"] for metric in piqa["metrics"]] == ["acc", "acc_norm"]
    assert (piqa["rows"], piqa["rows_available"], piqa["num_fewshot"], piqa["data_set"]) == (3, 3, 0, "baber/piqa")
    assert piqa["differences"] == ["3 of the 1,838 rows that the hub has"]

    nats = [by_hand(model, tokenizer, *text_and_word(row["text"]))[0] for row in ROWS["lambada_test"]]
    perplexity, acc = found["scores"]["lambada_openai"]["metrics"]
    assert perplexity["value"] == pytest.approx(math.exp(-sum(nats) / 3), rel=1e-6)
    assert perplexity["stderr"] > 0
    assert (acc["value"], acc["higher_is_better"], perplexity["higher_is_better"]) == (0, True, False)
    assert found["settings"]["seeds"] == {
        "python": 0,
        "numpy": 1234,
        "torch": 1234,
        "fewshot": 1234,
    }


def text_and_word(text: str) -> tuple[str, str]:
    before, _, word = text.rpartition(" ")
    return before, " " + word


def test_mmlu_is_the_mean_over_rows(bench, tokenizer) -> None:
    """One subject has three rows and the others one, so the mean over subjects would be another number."""
    model = decoder("mqa", max_position_embeddings=512)
    found = run_tasks(model, tokenizer, ["mmlu"], context=512, data_dir=str(bench), batch_size=16)["scores"]["mmlu"]
    subtasks = found["subtasks"]
    assert (len(subtasks), found["rows"]) == (57, 59)
    scores = {name: (entry["metrics"][0]["value"], entry["rows"]) for name, entry in subtasks.items()}
    assert scores["mmlu_anatomy"][1] == 3
    mean = sum(value * rows for value, rows in scores.values()) / 59
    assert found["metrics"][0]["value"] == pytest.approx(mean, rel=1e-12)
    assert mean != pytest.approx(sum(value for value, _ in scores.values()) / 57, abs=1e-4)


def test_examples_and_seed_reach_the_model(bench, tokenizer, tmp_path, monkeypatch) -> None:
    write(tmp_path, "arc_easy_test", ROWS["arc_easy_test"])
    train = [ai2(f"t{i}", f"Which is {i}?", ["a", "b", "c", "d"], "ABCD"[i % 4]) for i in range(20)]
    write(tmp_path, "arc_easy_train", train)
    asked: list[str] = []

    def loglikelihood(self, requests, **kwargs):
        asked.extend(request.args[0] for request in requests)
        return [(-1.0, False) for _ in requests]

    monkeypatch.setattr(LocalLM, "loglikelihood", loglikelihood)
    model = decoder("mha")
    contexts = {}
    for label, seed in {"first": 5, "again": 5, "other": 6, "default": None}.items():
        settings = {"context": 1024, "data_dir": str(tmp_path), "num_fewshot": 2, "seed": seed}
        found = run_tasks(model, tokenizer, ["arc_easy"], **settings)
        assert found["scores"]["arc_easy"]["num_fewshot"] == 2
        assert found["scores"]["arc_easy"]["differences"] == ["3 of the 2,376 rows that the hub has"]
        contexts[label], asked[:] = list(asked), []
    assert contexts["first"] == contexts["again"] != contexts["other"]
    (task,) = leaves(load_tasks(["arc_easy"], str(tmp_path))[1])
    assert contexts["default"] == [request[1][0] for request in rendered(task, num_fewshot=2)["requests"]]

    write(tmp_path, "arc_easy_dev", train)
    (tmp_path / "arc_easy_train.jsonl").unlink()
    found = run_tasks(model, tokenizer, ["arc_easy"], context=1024, data_dir=str(tmp_path), num_fewshot=2)
    note = "the 2 examples come from the validation rows, with lm-eval from train"
    assert note in found["scores"]["arc_easy"]["differences"]


def test_truncated_requests_are_counted(bench, tokenizer) -> None:
    model = decoder("mfa", max_position_embeddings=64)
    found = run_tasks(model, tokenizer, ["openbookqa", "boolq"], context=52, data_dir=str(bench), batch_size=4)
    prompts = [
        f"{row['title']} -- {row['passage']}\nQuestion: {row['question']}?\nAnswer:" for row in ROWS["boolq_dev"]
    ]
    lengths = sorted(len(prompt + answer) for prompt in prompts for answer in (" no", " yes"))
    assert lengths == [51, 52, 54, 55, 62, 63]
    assert (found["truncated_requests"], found["requests"]) == (4, 3 * 4 + 3 * 2)
    # The last token of an answer is predicted and not read: 54 fit.
    found = run_tasks(model, tokenizer, ["boolq"], context=53, data_dir=str(bench))
    assert found["truncated_requests"] == 3


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    decoder("mfa_kr", max_position_embeddings=128).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_command(folder, bench, tmp_path, monkeypatch) -> None:
    (tmp_path / "text.txt").write_text("some text")
    words = (
        "evaluate",
        folder,
        "--tasks",
        "piqa, arc_easy,bbh_cot_fewshot_snarks",
        "--perplexity",
        tmp_path / "text.txt",
    )
    words += ("--limit", 2, "--seed", 3, "--max-new-tokens", 4)
    done = multimatrix(*words, "--data-dir", bench, "--json", "--out", tmp_path / "results.json")
    assert done.status == 0, done.err
    results = json.loads(done.out)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert list(results["tasks"]["scores"]) == ["piqa", "arc_easy", "bbh_cot_fewshot_snarks"]
    assert set(results["tasks"]["settings"]["seeds"].values()) == {3}
    assert results["perplexity"]["tokens"] == 9
    piqa, _, snarks = results["tasks"]["scores"].values()
    assert (piqa["rows"], piqa["rows_available"], len(piqa["files_sha256"]["piqa_valid.jsonl"])) == (2, 3, 64)
    assert (snarks["num_fewshot"], snarks["metrics"][0]["filter"]) == (3, "get-answer")
    assert "at most 4 tokens are generated, with lm-eval 1024" in snarks["differences"]

    monkeypatch.setenv("MULTIMATRIX_BENCH", str(bench))
    table = multimatrix(*words).out
    for text in ("acc_norm", "exact_match", "limit 2, seeds: python 3", "lm-eval 0.", "lost their beginning"):
        assert text in table
    assert "piqa: 3 of the 1,838 rows that the hub has" in table


def test_list(bench) -> None:
    shown = multimatrix("evaluate", "--tasks", "list").out
    assert all(name in shown for name in NAMES)
    assert "hellaswag_val_1000" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--tasks", "pica"), "knows no task 'pica'; did you mean"),
        (("--tasks", "piqa,piqa"), "the task piqa is asked for more than once"),
        (("--tasks", "mmlu,mmlu_anatomy"), "the task mmlu_anatomy is asked for more than once"),
        (("--tasks", "lambada_standard"), "lm-eval's task lambada_standard cannot be loaded"),
        (("--tasks", "piqa", "--num-fewshot", 2), "no rows that the 2 examples of piqa can come from"),
        (("--tasks", "mmlu_virology", "--num-fewshot", 6), "has 5 rows for examples; give --num-fewshot of at most 5"),
        (("--tasks", "bbh"), "generates up to 1024 tokens and the context is 128"),
        (("--tasks", "piqa", "--context", 8), "an answer of the tasks has 24 tokens and the context 8"),
        (("--tasks", "piqa", "--limit", 0), None),
        (("--tasks", "piqa", "--seed", -1), None),
        (("--tasks", "piqa", "--seed", 2**32), None),
    ],
)
def test_bad_input(folder, bench, words, sentence) -> None:
    done = multimatrix("evaluate", folder, *words, "--data-dir", bench)
    if sentence is None:
        assert done.status == 2
        return
    assert sentence in done.sentence


def test_damaged_rows(folder, tmp_path) -> None:
    words = ("evaluate", folder, "--tasks", "piqa", "--data-dir", tmp_path)
    assert "has no piqa_valid.jsonl (or .jsonl.gz)" in multimatrix(*words).sentence
    for rows, sentence in {
        '{"goal": "a"}\n': "a row of {} has no field 'sol1'",
        '{"goal": "a"\n': "row 1 of {} is not JSON",
        '\n["goal"]\n': "row 2 of {} is not a JSON object",
        "\n": "{} has no rows",
    }.items():
        (tmp_path / "piqa_valid.jsonl").write_text(rows)
        assert sentence.format(tmp_path / "piqa_valid.jsonl") in multimatrix(*words).sentence
    write(tmp_path, "mmlu_test", mmlu_rows(1, "Test")[:3])
    subjects = multimatrix(*words[:3], "mmlu_virology", *words[4:])
    assert "has no rows whose subject is 'virology'" in subjects.sentence
    assert "does not exist" in multimatrix(*words[:-1], tmp_path / "none").sentence


def test_without_lm_eval(folder, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'multimatrix[lm-eval]'" in multimatrix("evaluate", folder, "--tasks", "piqa").sentence


@pytest.mark.skipif(None not in MATH, reason="lm-eval[math] is installed")
def test_a_package_that_a_task_needs(bench) -> None:
    with pytest.raises(InputError, match=r"needs a package that is not installed: .*math_verify"):
        load_tasks(["math500"], str(bench))
