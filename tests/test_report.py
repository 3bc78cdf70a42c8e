"""The report, the figures, the terminal table and the CSV file agree with the results they are made from."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from rich.console import Console

from command import multimatrix
from multimatrix.compare import figures, report
from multimatrix.compare.overview import write_overview
from multimatrix.locks import locked
from multimatrix.pages.drawing import format_bytes, style_of

# variant, shape, KV bytes per token, validation loss, verdict
VARIANTS = [
    ("mha", "9 x 32", 6912, 1.4032, "baseline"),
    ("gqa", "9 x 32", 2304, 1.4101, "tie"),
    ("mqa", "9 x 32", 768, 1.4388, "worse"),
    ("mla", "9 x 32", 960, 1.4155, "tie"),
    ("mfa", "12 x 64", 1536, 1.3869, "better"),
    ("mfa_kr", "12 x 64", 768, 1.4165, "tie"),
]
MARGIN = 0.0142


def sample(directory: Path, variants: list[tuple] = VARIANTS, seeds: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """Results of a finished comparison, and below `directory` the metrics of its runs."""
    rows, runs = [], []
    for variant, shape, size, loss, verdict in variants:
        values = [loss + 0.004 * (2 * k - len(seeds) + 1) for k in range(len(seeds))]
        several = len(seeds) > 1

        def over_seeds(values: list[float], several: bool = several) -> dict[str, Any]:
            spread = float(np.std(values, ddof=1)) if several else None
            return {"mean": float(np.mean(values)), "spread": spread, "values": values}

        rows.append(
            {
                "variant": variant,
                "heads": int(shape.split()[0]),
                "head_dim": int(shape.split()[2]),
                "shape": shape,
                "attention_parameters": 331_776 * 6,
                "parameters": 9_412_992 + size % 1000,
                "parameter_mismatch": 0.0 if verdict == "baseline" else 0.0012,
                "intermediate_size": 768,
                "kv_bytes_per_token": size,
                "kv_bytes_per_token_counted": size,
                "kv_reduction": 1 - size / 6912,
                "total_effective_rank": 288,
                "seeds": list(seeds),
                "validation_loss": over_seeds(values),
                "perplexity": over_seeds([math.exp(v) for v in values]),
                "bits_per_byte": over_seeds([v / math.log(2) for v in values]),
                "train_tokens_per_second": 18_250.4,
                "decode_tokens_per_second": 412.7,
                "peak_memory_bytes": 1_342_177_280,
                "wall_seconds": 1_135.0,
                "verdict": verdict if several or verdict == "baseline" else "one seed",
                "difference": 0.0 if verdict == "baseline" else loss - VARIANTS[0][3],
                "margin": MARGIN if several and verdict != "baseline" else None,
            }
        )
        for seed, value in zip(seeds, values, strict=True):
            runs.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "directory": f"runs/{variant}-seed{seed}",
                    "status": "done",
                    "reason": None,
                }
            )
            write_metrics(directory / runs[-1]["directory"], variant, seed, value)
    return {
        "title": "multimatrix compare",
        "version": "0.1.0",
        "created": "2026-11-23T02:00:00+00:00",
        "command": "multimatrix compare --preset demo --seeds 0,1",
        "complete": True,
        "baseline": "mha",
        "config": {
            "model": {"layers": 6, "hidden_size": 288},
            "training": {"learning_rate": 0.001, "betas": [0.9, 0.95]},
        },
        "environment": {
            "commit": "0f3c2d1",
            "python": "3.11.2",
            "torch": "2.13.0",
            "device": "cpu",
            "threads": 2,
        },
        "corpus": {"name": "demo", "sha256": "ab" * 32, "train_tokens": 10_000_000, "tokenizer": "bytes"},
        "can_show": [
            "KV bytes per token: stated by the spec and counted from real storage.",
            "That every variant trains: same data, same order, same schedule.",
        ],
        "cannot_show": [
            "A ranking: models this small, trained this briefly, do not predict large ones.",
            "Long context: no sequence here is longer than 512 bytes.",
        ],
        "rows": rows,
        "runs": runs,
    }


def write_metrics(run: Path, variant: str, seed: int, final: float, steps: int = 600) -> None:
    """Training losses every 5 steps and a validation loss every 60, falling to `final`."""
    noise = np.random.default_rng(zlib.crc32(f"{variant}{seed}".encode()))
    run.mkdir(parents=True)
    lines = []
    for step in range(5, steps + 1, 5):
        loss = final + 4.1 * (math.exp(-step / 35) - math.exp(-600 / 35)) + 0.5 * (math.exp(-step / 200) - math.exp(-3))
        tokens = step * 16_384
        lines.append(
            {
                "step": step,
                "tokens": tokens,
                "loss": loss - 0.03 + noise.normal(0, 0.03),
                "learning_rate": 0.001,
            }
        )
        if step % 60 == 0:
            lines.append({"step": step, "tokens": tokens, "validation_loss": loss})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def interrupted(directory: Path) -> dict[str, Any]:
    """The same comparison after a failure: MQA lost a seed, MLA has none, MFA-KR was never measured."""
    results = sample(directory)
    results["complete"] = False
    rows = {row["variant"]: row for row in results["rows"]}
    rows["mqa"].update(seeds=[0], verdict="one seed", margin=None)
    for key in ("validation_loss", "perplexity", "bits_per_byte"):
        rows["mqa"][key] = {
            "mean": rows["mqa"][key]["values"][0],
            "spread": None,
            "values": rows["mqa"][key]["values"][:1],
        }
    kept = ("variant", "shape", "kv_bytes_per_token")
    rows["mla"].update({key: None for key in rows["mla"] if key not in kept}, seeds=[])
    results["rows"][-1] = {"variant": "mfa_kr", "kv_bytes_per_token": 768}
    for run in results["runs"]:
        lost = {"mqa": (1,), "mla": (0, 1), "mfa_kr": (0, 1)}.get(run["variant"], ())
        if run["seed"] not in lost:
            continue
        failed = run["variant"] == "mla"
        run.update(
            status="failed" if failed else "missing",
            reason="loss was not finite at step 312" if failed else None,
        )
        metrics = directory / run["directory"] / "metrics.jsonl"
        if failed:
            metrics.write_text(metrics.read_text()[:4001])
        else:
            metrics.unlink()
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[dict[str, Any], Path, str]:
    """Results, run directory and page of a finished comparison, made once; not to be changed."""
    directory = tmp_path_factory.mktemp("finished")
    results = sample(directory)
    return results, directory, report.write_report(results, directory).read_text(encoding="utf-8")


class Page(HTMLParser):
    """The parts of a page that tests ask about: rows of cells, and everything that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "data")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] = (self.rows[-1][-1] + data).strip()

    def row(self, name: str, table: int = 0) -> list[str]:
        return [row for row in self.rows if row and row[0] == name][table]


def printed(results: dict[str, Any], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(report.console_table(results))
    return console.file.getvalue()


def test_page_loads_nothing(finished):
    text = finished[2]
    page = Page(text)
    assert "svg" in page.tags
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert page.loads
    assert all(target.startswith("#") for target in page.loads)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "@import" not in text


@pytest.mark.parametrize("variant", [name for name, *_ in VARIANTS])
def test_cells_are_the_results(finished, variant):
    results, _, text = finished
    page = Page(text)
    row = next(row for row in results["rows"] if row["variant"] == variant)
    quality, cost = (page.row(variant.upper().replace("_", "-"), table) for table in (0, 1))
    assert f"{row['validation_loss']['mean']:.4f}" in quality
    assert quality[8] == ("–" if variant == "mha" else f"{row['difference']:+.4f}")
    assert f"{100 * row['kv_bytes_per_token'] / 6912:.1f} %" in quality
    assert row["verdict"] == quality[-1]
    assert f"{row['intermediate_size']}" in cost
    assert "1.25 GiB" in cost
    assert "18,250" in cost
    for width in (80, 120):
        text = printed(results, width)
        assert f"{row['validation_loss']['mean']:.4f}" in text
        assert row["verdict"] in text


def test_headline_names_the_smallest_cache_that_holds(tmp_path):
    results = sample(tmp_path)
    text = report.headline(results)
    assert text.startswith("MFA-KR stores 11.1 % of MHA's cache; its loss is 0.0133 above MHA's, a tie")
    assert report.tally(results) == "Against MHA: 1 better, 3 tie, 1 worse."
    for row in results["rows"]:
        if row["verdict"] in ("tie", "better"):
            row["verdict"] = "worse"
    assert "worse by more than the margin of 0.0142" in report.headline(results)


def test_a_loss_that_is_not_finite_is_shown_and_not_judged(tmp_path):
    results = sample(tmp_path, [VARIANTS[0], VARIANTS[1], VARIANTS[-1]])
    nothing = {"mean": math.nan, "spread": None, "values": [math.nan, math.nan]}
    results["rows"][-1].update(validation_loss=nothing, difference=math.nan, verdict=None)
    row = next(line for line in printed(results, 120).splitlines() if line.startswith("MFA-KR"))
    assert row.split()[-4] == "nan"
    assert report.headline(results).startswith("GQA stores 33.3 %")
    assert len(figures.loss_against_kv_bytes(results).axes[0].texts) == 2


def test_limits_stand_before_the_table(finished):
    results, _, text = finished
    for limit in results["cannot_show"]:
        assert text.index("<h1>") < text.index(limit) < text.index("<table")
        assert " ".join(limit.split()[:4]) in printed(results, 80)


def test_bytes_that_disagree_are_loud(finished, tmp_path):
    assert "disagree" not in finished[2]
    results = sample(tmp_path, [VARIANTS[0], VARIANTS[1], VARIANTS[-1]])
    results["rows"][-1]["kv_bytes_per_token_counted"] = 1536
    page = report.render(results, tmp_path)
    warning = "MFA-KR states 768 bytes of cache per token, but 1,536 were counted"
    assert page.index(warning) < page.index("<table")
    assert Page(page).row("MFA-KR")[2] == "768 B ≠ 1.5 KiB"
    assert warning in " ".join(printed(results, 80).split())
    assert not report.headline(results).startswith("MFA-KR")


def test_one_seed_gives_no_verdict(tmp_path):
    results = sample(tmp_path, seeds=(0,))
    assert "with one seed, so no verdict" in report.headline(results)
    row = next(line for line in printed(results, 120).splitlines() if line.startswith("MFA "))
    assert row.split()[-4:] == ["–", "-0.0163", "one", "seed"]
    assert "no verdict" in figures.loss_against_kv_bytes(results).axes[0].get_title(loc="left")


def test_interrupted_comparison(tmp_path):
    results = interrupted(tmp_path)
    page = report.render(results, tmp_path)
    assert "Incomplete: 7 of 12 runs are done." in page
    assert ["MLA", "1", "failed", "0", "runs/mla-seed1", "loss was not finite at step 312"] in Page(page).rows
    assert Page(page).row("MLA")[5:] == ["0", "–", "–", "–", "–", "–"]
    assert "Incomplete" in printed(results, 80)


@pytest.mark.parametrize("results", [{}, {"rows": [], "runs": [], "corpus": None, "complete": False}])
def test_nothing_measured_yet(tmp_path, results):
    assert "No variant can be set against" in report.render(results, tmp_path)
    assert printed(results, 80)
    report.write_csv(results, tmp_path / "results.csv")
    figures.save_figures(results, tmp_path)


def test_names_are_text(tmp_path):
    name = "<b>$x_[red]--"
    results = sample(tmp_path, [VARIANTS[0], (name, "9 x 32", 512, 1.41, "tie")])
    results["command"] = "multimatrix compare --out '<script>'"
    results["runs"][-1]["reason"] = "<i>"
    text = report.render(results, tmp_path)
    assert not {"b", "script", "i"} & set(Page(text).tags)
    assert "<B>$X-[RED]--" in Page(text).row("<B>$X-[RED]--")
    assert "<B>$X-[RED]--" in printed(results, 120)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_terminal_table_fits(finished, width):
    lines = printed(finished[0], width).splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    row = next(line.split() for line in lines if line.startswith("MFA-KR ") and "tie" in line and "stores" not in line)
    assert row[:4] == ["MFA-KR", "12×64", "768", "B"]


def test_csv_holds_every_number_unrounded(tmp_path):
    results = interrupted(tmp_path)
    report.write_csv(results, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["variant"] for line in lines] == [row["variant"] for row in results["rows"]]
    for line, row in zip(lines, results["rows"], strict=True):
        for key in ("kv_bytes_per_token", "parameters", "difference", "verdict"):
            assert line[key] == ("" if row.get(key) is None else str(row[key]))
        loss = row.get("validation_loss") or {"values": []}
        written = [line[f"validation_loss_seed{seed}"] for seed in (0, 1)]
        assert [float(value) for value in written if value] == loss["values"]


def test_figure_files(finished):
    results, directory, _ = finished
    before = dict(matplotlib.rcParams)
    paths = figures.save_figures(results, directory)
    assert dict(matplotlib.rcParams) == before
    assert set(paths) == {f"loss_against_{what}.{end}" for what in ("tokens", "kv_bytes") for end in ("png", "svg")}
    assert sorted(paths.values()) == sorted((directory / "figures").iterdir())
    for name, path in paths.items():
        assert path.stat().st_size > 10_000
        assert path.read_bytes()[:4] == (b"\x89PNG" if name.endswith("png") else b"<?xm")


def test_same_results_give_the_same_page(finished):
    results, directory, text = finished
    assert report.render(results, directory) == text


def test_colours_follow_the_name(tmp_path):
    names = [name for name, *_ in VARIANTS]
    assert len({style_of(name) for name in [*names, "mfa_wide", "gta", "tpa"]}) == len(names) + 3
    assert style_of("something new") == style_of("something new")
    few = figures.loss_against_kv_bytes(sample(tmp_path / "few", VARIANTS[3:]))
    many = figures.loss_against_tokens(sample(tmp_path / "many"), tmp_path / "many")
    colour = style_of("mfa_kr")[0]
    for figure in (few, many):
        assert colour in {to_hex(line.get_color()) for line in figure.axes[0].lines}


def test_curves_are_means_over_seeds(finished):
    results, directory, _ = finished
    validation, training = figures.loss_against_tokens(results, directory).axes
    assert len(validation.lines) == len(training.lines) == len(VARIANTS)
    line = validation.lines[0]
    assert line.get_ydata()[-1] == pytest.approx(results["rows"][0]["validation_loss"]["mean"])
    assert line.get_xdata()[-1] == 600 * 16_384
    losses = [float(text.get_text().split()[-1]) for text in validation.texts]
    assert losses == sorted(losses)


def test_long_runs_are_drawn_in_few_points(tmp_path):
    results = sample(tmp_path, VARIANTS[:1], seeds=(0,))
    run = tmp_path / results["runs"][0]["directory"]
    rows = [{"step": step, "tokens": step * 100, "loss": 2 + 1 / step} for step in range(1, 20_001)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (line,) = figures.loss_against_tokens(results, tmp_path).axes[0].lines
    assert len(line.get_xdata()) == 400
    assert (line.get_xdata()[0], line.get_xdata()[-1]) == (100, 2_000_000)
    assert line.get_ydata()[-1] == pytest.approx(2 + 1 / 20_000, abs=1e-5)


def test_one_evaluation_leaves_training_alone(tmp_path):
    results = sample(tmp_path)
    for run in results["runs"]:
        path = tmp_path / run["directory"] / "metrics.jsonl"
        lines = path.read_text().splitlines()
        path.write_text(
            "\n".join(line for i, line in enumerate(lines) if "validation" not in line or i > len(lines) - 2)
        )
    assert [axes.get_ylabel() for axes in figures.loss_against_tokens(results, tmp_path).axes] == [
        "training loss, smoothed"
    ]


@pytest.mark.parametrize("make", [sample, interrupted])
def test_names_in_figures_do_not_overlap(tmp_path, make):
    results = make(tmp_path)
    for figure in (figures.loss_against_kv_bytes(results), figures.loss_against_tokens(results, tmp_path)):
        figure.draw_without_rendering()
        for axes in figure.axes:
            boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]
            assert len(boxes) > 2
            assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
            for i, box in enumerate(boxes):
                assert box.count_overlaps(boxes[i + 1 :]) == 0


def test_no_name_is_struck_through_by_the_baseline(finished):
    axes = figures.loss_against_kv_bytes(finished[0]).axes[0]
    level = axes.transData.transform((6912, VARIANTS[0][3]))[1]
    assert len(axes.texts) == len(VARIANTS)
    for text in axes.texts:
        box = text.get_window_extent()
        assert not box.y0 < level < box.y1


def test_bytes_in_words():
    assert [format_bytes(n) for n in (None, 0, 512, 4096, 6912, 3 << 29)] == [
        "–",
        "0 B",
        "512 B",
        "4 KiB",
        "6.75 KiB",
        "1.5 GiB",
    ]
    assert report.duration(45) == "45 s"
    assert report.duration(7_500) == "2 h 05 min"


# ---- while runs go on --------------------------------------------------------------------------------------------


def under_way(directory: Path) -> dict[str, Any]:
    """The same comparison in its middle: two runs are under way, one waits, one failed, the others are done."""
    results = sample(directory)
    results.update(complete=False, running=True)
    for run in results["runs"]:
        run.update(step=600, steps=600)
        key = (run["variant"], run["seed"])
        if key in (("mfa", 1), ("mfa_kr", 0)):
            metrics = directory / run["directory"] / "metrics.jsonl"
            metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines()[:40]))
            run.update(status="running", step=180)
        elif key == ("mfa_kr", 1):
            (directory / run["directory"] / "metrics.jsonl").unlink()
            run.update(status="waiting", step=0)
        elif key == ("mla", 1):
            run.update(
                status="failed", reason="the training loss is nan at step 312; lower the learning rate", step=311
            )
    return results


def test_a_page_reads_itself_again_while_runs_go_on(tmp_path, finished):
    results = under_way(tmp_path)
    text = report.render(results, tmp_path)
    assert '<meta http-equiv="refresh" content="20">' in text
    assert "Incomplete" not in text
    assert re.findall(r'<span class="(\w+)">(\d+)</span> \1', text) == [
        ("running", "2"),
        ("waiting", "1"),
        ("done", "8"),
        ("failed", "1"),
    ]
    assert "MLA with seed 1 failed: the training loss is nan at step 312; lower the learning rate" in text
    assert ["MFA-KR", "0", "running", "180 of 600", "runs/mfa_kr-seed0", ""] in Page(text).rows
    assert "http-equiv" not in finished[2]
    results.update(running=False)
    text = report.render(results, tmp_path)
    assert "http-equiv" not in text
    assert "Incomplete: 8 of 12 runs are done." in text


def test_runs_under_way_are_drawn(tmp_path):
    results = under_way(tmp_path)
    validation, training = figures.loss_against_tokens(results, tmp_path).axes
    for axes in (validation, training):
        thin = [line for line in axes.lines if line.get_linewidth() == 0.9]
        assert [line.get_color() for line in thin] == [style_of(name)[0] for name in ("mfa", "mfa_kr")]
        assert len({line.get_xdata()[-1] for line in thin}) == 1
        texts = [text.get_text() for text in axes.texts]
        assert [text for text in texts if "(" in text] == [text for text in texts if text.startswith("MFA-KR")]
        assert any(text.endswith("(running)") for text in texts)


def test_many_failures_are_not_all_repeated(tmp_path):
    results = sample(tmp_path)
    for run in results["runs"][:7]:
        run.update(status="failed", reason="no memory")
    found = report.alarms(results)
    assert [line for line in found if line.endswith("failed: no memory")] == found[:5]
    assert found[5].startswith("2 more failed")


# ---- any folder of runs ------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder with two training runs, one of them running, one that failed, and something else."""
    for name in ("big/mfa", "big/mha", "small"):
        write_metrics(tmp_path / name, name, 0, 1.4)
    (tmp_path / "big" / "mfa" / "config.json").write_text('{"steps": 600, "seed": 0}')
    (tmp_path / "big" / "mfa" / "result.json").write_text('{"validation_loss": 1.4}')
    metrics = tmp_path / "big" / "mha" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()[:31]
    lines.append(
        '{"step": 150, "tokens": 2457600, "loss": 2.5, "tokens_per_second": 9876.5, "mfu": 0.48, "seconds_left": 75}'
    )
    metrics.write_text("\n".join([*lines, '{"step": 155, "tok']))
    (tmp_path / "big" / "mha" / "config.json").write_text('{"steps": 600}')
    (tmp_path / "small" / "failed.json").write_text('{"identity": {"steps": 700}, "reason": "no <memory>"}')
    (tmp_path / "notes.txt").write_text("notes")
    return tmp_path


def test_all_runs_of_a_folder(runs):
    with locked(runs / "big" / "mha" / "run.lock", ""):  # as whoever trains there does
        found = write_overview(runs)
        done = multimatrix("report", runs)
    assert found.running
    text = found.path.read_text()
    page = Page(text)
    assert page.rows[0] == ["run", "status", "steps", "loss", "valid. loss", "tok/s", "MFU", "left", "reason"]
    assert [row[:3] for row in page.rows[1:]] == [
        ["big/mfa", "done", "600 of 600"],
        ["big/mha", "running", "150 of 600"],
        ["small", "failed", "600 of 700"],
    ]
    assert page.rows[2][3] == "2.5000"
    assert page.rows[2][5:] == ["9,876", "48.0 %", "75 s", ""]
    assert page.rows[3][-1] == "no <memory>"
    assert '<meta http-equiv="refresh" content="20">' in text
    assert all(target.startswith("#") for target in page.loads)
    assert done.status == 0
    assert re.search(r"big/mha +running +150/600 +2\.5000", done.out)
    assert done.out.endswith(f"Report: {runs / 'report.html'}\n")
    again = write_overview(runs)
    assert not again.running
    assert "http-equiv" not in again.path.read_text()
    assert ["big/mha", "stopped", "150 of 600"] in [row[:3] for row in Page(again.path.read_text()).rows]


def test_a_single_run(runs):
    found = write_overview(runs / "big" / "mfa")
    assert "1 run in mfa" in found.path.read_text()
    assert found.path == runs / "big" / "mfa" / "report.html"


def test_more_runs_than_can_be_told_apart(tmp_path):
    for seed in range(30):
        write_metrics(tmp_path / f"run{seed:02}", "mha", seed, 1.4, steps=60)
        os.utime(tmp_path / f"run{seed:02}" / "metrics.jsonl", (seed, seed))
    text = write_overview(tmp_path).path.read_text()
    assert "Drawn are the 24 runs that changed last." in text
    assert len(Page(text).rows) == 31
    assert text.count('style="background: transparent"') == 6


def test_follow_ends_with_the_last_run(runs, monkeypatch):
    lock = contextlib.ExitStack()
    lock.enter_context(locked(runs / "big" / "mha" / "run.lock", ""))
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            lock.close()

    monkeypatch.setattr(time, "sleep", sleep)
    done = multimatrix("report", runs, "--follow", "--every", 5)
    assert (done.status, slept) == (0, [5.0, 5.0])


def test_folders_without_runs(tmp_path):
    assert "there is no folder" in multimatrix("report", tmp_path / "nowhere").sentence
    assert f"no run lies below {tmp_path}" in multimatrix("report", tmp_path).sentence
    assert "--every must be from 1 to 86400" in multimatrix("report", tmp_path, "--every", 0).sentence
    assert not list(tmp_path.iterdir())
