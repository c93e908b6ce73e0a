"""The page holds what the run's files hold, runs nothing that they say, and serves eyes, keyboards, ears and paper."""

from __future__ import annotations

import html
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import sys
import webbrowser
import zlib
from collections.abc import Iterator
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import file_limit, requires_chromium
from reported import LAYERS, evaluation, finetune_run, picture, pretrain_run, write_lines
from runs import flags

from fcmae import options, planning
from fcmae.classification import write_confusion
from fcmae.cli import main
from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.evaluation.charts import COLOURS
from fcmae.evaluation.report import MARK, MOST_PICTURES, command, report, reproduce
from fcmae.evaluation.runs import CONFIGS, read_run
from fcmae.training.records import Ended, last_state, record_end

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'&"


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def charts(page: str) -> list[dict[str, Any]]:
    return [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]


def traces(page: str, kind: str) -> list[dict[str, Any]]:
    return [trace for chart in charts(page) for trace in chart["data"] if trace["type"] == kind]


def series(path: Path, key: str) -> dict[str, list[float]]:
    """What metrics.jsonl has under a key, as a chart should hold it."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["epoch"], line[key]) for line in lines if key in line]
    return {name: [line[i] for line in found] for i, name in enumerate(("customdata", "x", "y"))}


# Where it is written


def test_the_page_of_one_run_lies_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pretrain_run(tmp_path / "run")
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out == f"report: {path / 'report.html'}\n"
    assert text(path / "report.html").startswith("<!DOCTYPE html>")


def test_several_runs_need_a_name_for_the_page(tmp_path: Path) -> None:
    runs = [pretrain_run(tmp_path / "a"), pretrain_run(tmp_path / "b")]
    with pytest.raises(ValueError, match="--out is missing for 2 runs: name the file to write"):
        report(runs)
    assert report(runs, tmp_path / "new" / "page.html").is_file()


@pytest.mark.parametrize("error", [None, webbrowser.Error("no runnable browser"), FileNotFoundError()])
def test_a_page_is_opened_where_there_is_a_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    opened: list[str] = []

    def open_page(url: str) -> bool:
        opened.append(url)
        if error is not None:
            raise error
        return False

    monkeypatch.setattr(webbrowser, "open", open_page)
    monkeypatch.chdir(tmp_path)
    pretrain_run(Path("a run"))
    assert main(["report", "a run"]) == 0 and not opened
    assert main(["report", "a run", "--open"]) == 0
    assert opened == [(tmp_path / "a run" / "report.html").as_uri()]


def test_a_file_that_is_no_report_is_refused_and_a_report_is_replaced(tmp_path: Path) -> None:
    path, out = pretrain_run(tmp_path / "run"), tmp_path / "page.html"
    for content in ("<html>my thesis</html>", ""):
        out.write_text(content)
        with pytest.raises(ValueError, match="is there and no report of fcmae: name another file with --out"):
            report([path], out)
        assert text(out) == content
    with pytest.raises(ValueError, match="is a directory: name the file to write"):
        report([path], tmp_path)
    out.unlink()
    before = text(report([path], out))
    write_lines(path, [])
    assert text(report([path], out)) != before
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "page.html"}


def test_a_directory_that_is_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"fcmae: error: {tmp_path} holds no run of fcmae: give the directory that --out named\n"
    )
    assert not list(tmp_path.iterdir())


# What it holds


def test_the_numbers_are_those_of_metrics_jsonl(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    page = text(report([path]))
    assert {line["name"]: {k: line[k] for k in ("customdata", "x", "y")} for line in traces(page, "scatter")} == {
        key: series(path, key)
        for key in ("loss", "val_loss", "lr", "grad_norm", "images_per_s", "data_wait_share", "knn_top1")
    }
    for found, prefix in zip(traces(page, "heatmap"), ("cosine_distance", "effective_rank"), strict=True):
        assert found["y"] == list(LAYERS)
        for layer, steps, values in zip(found["y"], found["customdata"], found["z"], strict=True):
            assert {"customdata": steps, "x": found["x"], "y": values} == series(path, f"{prefix}/{layer}")


def test_without_plotly_a_sentence_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    path = pretrain_run(tmp_path / "run")
    assert main(["report", str(path)]) == 2
    assert capsys.readouterr().err == "fcmae: error: report needs plotly to draw charts: pip install plotly\n"
    assert not (path / "report.html").exists()


def test_scores_of_probes_have_their_spread(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    evaluation(path / "evaluation", "runs/run", 0.7312)
    page = text(report([path]))
    row = '<tr><th scope="row">{}</th><td>4</td><td>runs/run</td><td>-</td><td>{}</td><td>-</td></tr>'
    assert row.format("linear", "0.731") in page
    assert row.format("linear, 1% (8 labels)", "0.610 [0.580, 0.640]") in page
    assert "<figcaption>Confusion</figcaption>" in page
    assert "800 labelled images to learn from (labelled), 400 to test on (held), 2 classes" in page


@pytest.mark.parametrize("num", [2, 120])
def test_the_classes_that_a_classifier_finds_least_come_first(tmp_path: Path, num: int) -> None:
    path = finetune_run(tmp_path / "run", 0.7)
    names = [f"class {number}" for number in range(num)]
    confusion = np.diag(np.full(num, 8))
    confusion[1] = 0
    confusion[1, :2] = 3, 1
    (path / "last").mkdir()
    write_confusion(path / "last" / "confusion.csv", confusion, names)
    page = text(report([path]))
    row = '<tr><th scope="row">{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>'
    first = row.format("class 1", 4, "25.0%", "100.0%", "class 0 (3)")
    second = row.format("class 0", 8, "100.0%", "72.7%", "")
    assert re.search(rf"{re.escape(first)}\s*{re.escape(second)}", page)
    assert "Recall and precision of each class (last)" in page
    assert ("The 100 of 120 with the lowest recall" in page) is (num == 120)


@pytest.mark.parametrize("content", ["true,a\n\na,1\n", f"true,a\na,{10**30}\n", "true,a\na,x\n"])
def test_a_damaged_confusion_matrix_and_odd_settings_spoil_no_report(tmp_path: Path, content: str) -> None:
    path = finetune_run(tmp_path / "run", 0.7)
    (path / "last").mkdir()
    (path / "last" / "confusion.csv").write_text(content)
    header = (path / "config.yaml").read_text().partition("\n")[0]
    (path / "config.yaml").write_text(f"{header}\nseed: [1, 2]\nmodel: {{init: [x]}}\n")
    assert "confusion.csv cannot be shown" in text(report([path]))


def test_commands_of_a_file_are_words_alone(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    starts = json.loads((path / "environment.json").read_text())
    starts[-1]["command"] = "fcmae pretrain photos; rm -rf b"
    (path / "environment.json").write_text(json.dumps(starts))
    page = html.unescape(text(report([path])))
    assert "fcmae pretrain 'photos;' rm -rf b" in page and "photos; rm" not in page


def test_figures_and_numbers_of_an_analysis_are_shown(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    picture(path / "analysis" / "cosine_distance.png")
    layer = {"name": "stages.0.0", "cosine_distance": 0.41234, "effective_rank": None}
    record = {"models": [{"name": "runs/run", "layers": [layer]}]}
    (path / "analysis" / "analysis.json").write_text(json.dumps(record))
    page = text(report([path]))
    assert "<figcaption>Cosine distance</figcaption>" in page
    assert '<th scope="row">stages.0.0</th><td>runs/run</td><td>0.4123</td><td></td>' in page


def test_fine_tuning_shows_its_last_and_its_best_scores(tmp_path: Path) -> None:
    page = text(report([finetune_run(tmp_path / "run", 0.7)]))
    assert '<th scope="row">last</th><td>3</td><td>0.7</td>' in page
    assert '<th scope="row">best by balanced_accuracy</th><td>2</td><td>0.75</td>' in page
    assert "Are the features collapsing?" not in page


def test_runs_are_compared_in_curves_scores_and_settings(tmp_path: Path) -> None:
    runs = [pretrain_run(tmp_path / "a"), pretrain_run(tmp_path / "b", seed=7), finetune_run(tmp_path / "c", 0.7)]
    page = text(report(runs, tmp_path / "page.html"))
    overlaid = [chart["data"] for chart in charts(page) if [line.get("name") for line in chart["data"]] == ["a", "b"]]
    for key, lines in zip(("loss", "val_loss"), overlaid, strict=True):
        assert [{k: line[k] for k in ("customdata", "x", "y")} for line in lines] == [series(r, key) for r in runs[:2]]
    assert '<th scope="row">seed</th><td>0</td><td>7</td>' in page
    different = page.partition("Settings that differ")[2].partition("</table>")[0]
    assert re.findall('<th scope="row">(.*?)</th>', different) == ["seed", "data.path"]


def test_why_settings_were_chosen_is_no_setting_that_differs(tmp_path: Path) -> None:
    runs = [pretrain_run(tmp_path / name / "run") for name in "ab"]
    for run, seconds in zip(runs, (1, 2), strict=True):
        cfg = options.read(PretrainConfig, run / "config.yaml")
        chosen = cfg.model_copy(update={"planned_s": seconds, "chosen": {"epochs": f"in {seconds} s"}})
        head = (run / "config.yaml").read_text().partition("\n")[0]
        (run / "config.yaml").write_text(f"{head}\n{options.dump(chosen)}")
    different = text(report(runs, tmp_path / "page.html")).partition("Settings that differ")[2].partition("</table>")[0]
    assert re.findall('<th scope="row">(.*?)</th>', different) == ["data.path"]


def test_runs_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    runs = [pretrain_run(tmp_path / "a" / "run"), pretrain_run(tmp_path / "b" / "run")]
    page = text(report(runs, tmp_path / "page.html"))
    for run in runs:
        assert f">{run} (pretraining)</h2>" in page


def test_many_pictures_are_thinned_and_the_last_is_there(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run", num_epochs=30)
    page = text(report([path]))
    labels = re.findall('data-label="(step.*?)"', page)
    assert len(labels) == MOST_PICTURES
    assert (labels[0], labels[-1]) == ("step 10, epoch 1", "step 300, epoch 30")
    assert f"{MOST_PICTURES} of 30 pictures, evenly spaced" in page


def test_a_name_that_is_no_unicode_is_shown_as_far_as_it_can_be(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    assert "<h1>Report on caf?</h1>" in text(report([path]))


def test_an_evaluation_alone_shows_its_scores(tmp_path: Path) -> None:
    path = finetune_run(tmp_path / "run", 0.7)
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("eval_only: false", "eval_only: true"))
    write_lines(path, [{"step": 0, "epoch": 0.0, "val_loss": 0.5, "top1": 0.71, "balanced_accuracy": 0.72}])
    page = text(report([path]))
    assert '<th scope="row">scores</th><td>0</td><td>0.72</td><td>0.71</td>' in page
    assert "too high" not in page


@pytest.mark.parametrize("missing", ["metrics.jsonl", "files.json", "environment.json", "reconstructions"])
def test_what_is_missing_hinders_nothing(tmp_path: Path, missing: str) -> None:
    path = pretrain_run(tmp_path / "run")
    if (path / missing).is_dir():
        shutil.rmtree(path / missing)
    else:
        (path / missing).unlink()
    assert "<h3>What was run</h3>" in text(report([path]))


def test_what_cannot_be_read_is_a_sentence_in_its_place(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    for name, content in (("a", "{"), ("b", '{"model": "m"}'), ("c", '{"data": 3, "results": 4}')):
        evaluation(path / "evaluation" / name, "run", 0.5)
        (path / "evaluation" / name / "evaluation.json").write_text(content)
    (path / "analysis").mkdir()
    (path / "analysis" / "analysis.json").write_text('{"models": 3}')
    (path / "analysis" / "grn.png").write_text("no picture")
    (path / "reconstructions" / "step-00000010.png").write_bytes(b"\x89PNG")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('3\n{"epoch": 7.0}\n{"step": 62, "ep')
    page = text(report([path]))
    assert page.count("run <code>fcmae evaluate</code> again") == 3
    assert page.count("run <code>fcmae analyze</code> again") == 1
    assert page.count("cannot be shown (it is no PNG).") == 2


# Commands to reproduce


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", *flags(Path("photos"), Path("out"), log__trackers="tensorboard,wandb", seed=5)],
        ["pretrain", *flags(Path("a b's"), Path("o"), model__compile="auto", optim__clip_grad=1e-5), "--out=-out"],
        ["pretrain", "--out", "x", "--data.path", '["one,two", "[three]", "none"]', "--data.path", "a*"],
        [
            "pretrain",
            "--out",
            "x",
            "--data.path",
            '["none"]',
            "--data.in_chans",
            "1",
            "--data.mean=-.5",
            "--data.std=1",
        ],
        ["finetune", "--config", "finetune_cpu", "--data.path", "l", "--model.init", "run", "--out", "o"],
        [
            *("finetune", "--out", "o", "--data.path", "l", "--model.variant", "convnextv2_atto"),
            *("--regularization.class_weights", "1,2", "--data.auto_augment", "none", "--eval-only", "false"),
        ],
    ],
)
def test_the_command_gives_the_same_settings(words: list[str], tmp_path: Path) -> None:
    kind: type[PretrainConfig] | type[FinetuneConfig] = CONFIGS[words[0]]
    cfg = options.load(kind, words[1:], prog="test")
    (tmp_path / "config.yaml").write_text(f"# fcmae {words[0]} 0.1.0\n{options.dump(cfg)}")
    run = read_run(tmp_path, "run")
    (shown,) = reproduce(run).commands
    program, subcommand, *rest = shlex.split(shown)
    assert (program, subcommand) == ("fcmae", words[0])

    def complete(sketch: Any, given: Any) -> dict[str, Any]:
        assert planning._is_settled(sketch, given)  # nothing but parts is left to choose
        return {}

    assert options.load(kind, rest, prog="test", complete=complete) == cfg
    assert "--config" not in rest


def test_several_processes_are_launched() -> None:
    line = "accelerate launch --multi_gpu --num_processes 4 -m fcmae.cli pretrain --seed 1"
    assert command("pretrain", {"seed": 1}, 4) == line


def test_the_commands_are_on_the_page_as_they_were_typed(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    evaluation(path / "evaluation", "run", 0.5)
    commands = re.findall('<pre tabindex="0"><code>(.*?)</code>', text(report([path])), re.S)
    assert commands[0] == "fcmae pretrain --out run"
    assert commands[1].startswith("fcmae pretrain --out ")
    assert commands[2] == "fcmae evaluate run --data labelled"


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield program
        program.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has everything a page can show, with names that try to run something."""
    path = pretrain_run(tmp_path_factory.mktemp("runs") / HOSTILE.replace("/", "∕"), data__in_chans=3)
    evaluation(path / "evaluation", HOSTILE, 0.7, (HOSTILE, "</script>"))
    picture(path / "analysis" / f"{HOSTILE.replace('/', '∕')}.png")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    named = [{key.replace("stages.0.0", f"</script>{HOSTILE}"): value for key, value in line.items()} for line in lines]
    write_lines(path, named)
    report([path])
    return path


@pytest.fixture
def page(browser: Any, run: Path) -> Iterator[Any]:
    """The page, opened from the disk; whatever the browser complains of or asks for fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    opened = context.new_page()
    noted: list[str] = []
    opened.on("console", lambda message: noted.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: noted.append(f"error: {error}"))
    opened.on("request", lambda request: noted.append(request.url[:80]))
    opened.goto((run / "report.html").as_uri())
    yield opened
    asked = [line for line in noted if not line.startswith(("file:", "data:"))]
    assert not asked
    assert sum(line.startswith("file:") for line in noted) == 1
    context.close()


@requires_chromium
def test_names_cannot_run_anything(page: Any) -> None:
    assert page.title().startswith("Report on <script>")
    assert page.locator("script").count() == page.locator("figure script[type='application/json']").count() + 2
    assert page.evaluate("[...document.querySelectorAll('img')].every((img) => img.src.startsWith('data:image/'))")
    assert page.evaluate("document.querySelectorAll('[onerror], [onclick], [onload]').length") == 0


@requires_chromium
def test_the_policy_stops_what_would_get_in(page: Any, browser: Any, run: Path) -> None:
    """Even a page into which something was put runs our script alone."""
    bad = run / "bad.html"
    bad.write_text(text(run / "report.html").replace("<main", f"{HOSTILE.replace('∕', '/')}<img src='bad.png'><main"))
    opened = browser.new_page()
    blocked: list[str] = []
    opened.on("console", lambda message: blocked.append(message.text))
    opened.goto(bad.as_uri())
    assert opened.title() != "owned"
    assert sum("Content Security Policy" in line for line in blocked) >= 3
    opened.close()


@requires_chromium
def test_every_picture_is_there(page: Any) -> None:
    found = page.evaluate(
        "Promise.all([...document.querySelectorAll('img')].map((img) => img.decode().then(() => img.naturalWidth)))"
    )
    assert len(found) == 6 + 2 and all(width == 16 for width in found)


def hover(page: Any, chart: Any, x: float, y: float) -> str:
    """What a chart says of the point at a place of its axes; y in shares of the height, from the top."""
    chart.scroll_into_view_if_needed()
    right = chart.evaluate("(e, x) => e._fullLayout.xaxis._offset + e._fullLayout.xaxis.l2p(x)", x)
    down = chart.evaluate("(e, y) => e._fullLayout.yaxis._offset + y * e._fullLayout.yaxis._length", y)
    box = chart.bounding_box()
    page.mouse.move(box["x"] + right, box["y"] + down)
    label = chart.locator(".hoverlayer :is(.legend, .hovertext)")
    label.first.wait_for()
    return str(label.first.evaluate("(e) => [...e.querySelectorAll('text')].map((t) => t.textContent).join('|')"))


@requires_chromium
def test_the_pointer_reads_the_values_nearest_to_it(page: Any, run: Path) -> None:
    chart, loss, val_loss = page.locator(".plot").first, series(run, "loss"), series(run, "val_loss")
    i = loss["x"].index(3.2)
    # A little beside the point, which is between two evaluations.
    assert hover(page, chart, 3.23, 0.5) == (
        f"epoch 3.2|loss : {loss['y'][i]:.4g} (step 32)|val_loss : {val_loss['y'][2]:.4g} (step 30)"
    )
    page.mouse.move(5, 5)
    chart.locator(".hoverlayer .legend").wait_for(state="detached")


@requires_chromium
def test_the_drawn_line_ends_where_its_last_value_lies(page: Any, run: Path) -> None:
    chart, last = page.locator(".plot").first, series(run, "val_loss")
    place = chart.evaluate("(e, y) => e._fullLayout.yaxis._offset + e._fullLayout.yaxis.l2p(y)", last["y"][-1])
    dot = chart.locator(".trace").nth(1).locator(".point").last.bounding_box()
    assert dot["y"] + dot["height"] / 2 - chart.bounding_box()["y"] == pytest.approx(place, abs=1)


@requires_chromium
def test_cells_of_a_heat_map_are_read(page: Any) -> None:
    chart = page.locator(".plot").filter(has=page.locator(".heatmaplayer image")).first
    chart.scroll_into_view_if_needed()
    # Six evaluations of four layers.
    assert hover(page, chart, 3.1, 1.5 / 4) == "stages.1.0epoch 3, step 300.44"
    assert hover(page, chart, 5.0, 0.5 / 4).startswith(f"</script>{HOSTILE}epoch 5, step 50")


@requires_chromium
def test_the_slider_shows_the_picture_of_its_step(page: Any) -> None:
    shown = page.locator(".series img:visible")
    assert [shown.count(), shown.get_attribute("data-label")] == [1, "step 60, epoch 6"]
    slider = page.locator("input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    assert [shown.count(), shown.get_attribute("data-label")] == [1, "step 10, epoch 1"]
    assert slider.get_attribute("aria-valuetext") == page.locator("output").inner_text() == "step 10, epoch 1"


@requires_chromium
def test_without_a_script_pictures_and_tables_are_there(browser: Any, run: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto((run / "report.html").as_uri())
    assert opened.locator(".series img:visible").get_attribute("data-label") == "step 60, epoch 6"
    assert not opened.locator("input[type=range]").is_visible()
    assert opened.locator("noscript").is_visible()
    assert opened.locator("figure details").first.is_visible()
    context.close()


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of rgb(...)."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@requires_chromium
def test_both_schemes_have_their_ground_and_enough_contrast(page: Any) -> None:
    variables = ["text", "quiet", "link", "good", "attention", "unknown"]
    grounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        # The probe takes each variable as its colour, so that the browser says what it is.
        colours = page.evaluate(
            """(names) => names.map((name) => {
                 const probe = document.body.appendChild(document.createElement('i'));
                 probe.style.color = `var(--${name})`;
                 const colour = getComputedStyle(probe).color;
                 probe.remove();
                 return colour;
               })""",
            [*variables, "page", "card", "code"],
        )
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colours[-3]
        grounds.add(colours[-3])
        for name, colour in zip(variables, colours, strict=False):
            for ground in colours[-3:-1]:
                assert contrast(colour, ground) >= 4.5, (scheme, name, colour, ground)
        assert contrast(colours[0], colours[-1]) >= 4.5
        for line in COLOURS:  # of what is drawn, 3 is asked
            assert contrast(f"rgb{tuple(bytes.fromhex(line[1:]))}", colours[-2]) >= 3, (scheme, line)
        chart = page.locator(".plot").first
        for part in (".xtick text", ".xtitle", ".legendtext"):
            assert chart.locator(part).first.evaluate("(e) => getComputedStyle(e).fill") == colours[0]
    assert len(grounds) == 2


@requires_chromium
def test_on_paper_all_is_open_and_light(page: Any) -> None:
    assert not any(table.is_visible() for table in page.locator("details table").all())
    page.emulate_media(media="print", color_scheme="dark")
    assert all(table.is_visible() for table in page.locator("details table").all())
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert luminance(page.evaluate("getComputedStyle(document.body).color")) < 0.05
    assert page.locator("figure").first.evaluate("(e) => getComputedStyle(e).breakInside") == "avoid"
    assert not page.locator("nav").is_visible()
    # A chart that was drawn for the screen is not cut off: it is narrower than a sheet of A4.
    assert all(box["width"] < 600 for box in (chart.bounding_box() for chart in page.locator(".plot").all()))


@requires_chromium
@pytest.mark.parametrize("width", [320, 400, 1200])
def test_no_width_makes_the_page_scroll_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for element in page.locator("details").all():
        element.evaluate("(e) => { e.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@requires_chromium
def test_motion_is_left_out_for_those_who_ask(page: Any) -> None:
    behaviour = "getComputedStyle(document.documentElement).scrollBehavior"
    assert page.evaluate(behaviour) == "smooth"
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(behaviour) == "auto"


@requires_chromium
def test_the_structure_is_there_for_those_who_cannot_see_it(page: Any) -> None:
    assert page.evaluate("document.documentElement.lang") == "en"
    levels = [
        int(name[1]) for name in page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => h.tagName)")
    ]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for landmark in ("header", "nav[aria-label]", "main"):
        assert page.locator(landmark).count() == 1
    # What each selector finds is a fault.
    for fault in (
        "img:not([alt]), img[alt='']",
        "table:not(:has(caption))",
        "th:not([scope])",
        "figure:not(:has(figcaption))",
        ".plot:not([role=img][aria-label])",
        "figure:has(.plot):not(:has(details table))",
        "section:not([aria-labelledby])",
    ):
        assert page.locator(fault).count() == 0, fault
    assert page.evaluate("[...document.querySelectorAll('input')].every((input) => input.labels.length > 0)")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    targets = page.evaluate(
        "[...document.querySelectorAll('a[href], [aria-labelledby], [for]')].map((e) => "
        "(e.getAttribute('href') ?? e.getAttribute('aria-labelledby') ?? e.htmlFor).toString()"
        ".replace('#', ''))"
    )
    assert set(targets) <= set(ids)
    page.keyboard.press("Tab")
    assert page.locator(".skip").evaluate("(e) => e === document.activeElement && e.getBoundingClientRect().left >= 0")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


def test_the_page_names_no_address_but_those_in_plotly(run: Path) -> None:
    from plotly.offline import get_plotlyjs

    page = text(run / "report.html")
    assert MARK in page[:1000] and page.count(get_plotlyjs()) == 1
    assert not re.findall(r"https?:[^\s\"'`<)]*", page.replace(get_plotlyjs(), ""))


def test_a_link_that_leads_nowhere_is_not_written_over(tmp_path: Path) -> None:
    run, page = pretrain_run(tmp_path / "run"), tmp_path / "page.html"
    page.symlink_to(tmp_path / "unplugged" / "page.html")
    with pytest.raises(ValueError, match="a link that leads nowhere"):
        report([run], page)
    assert page.is_symlink() and not page.exists()


# Whatever state a run is in

ODD = (None, True, -1, 1e308, 10**400, math.nan, "", "\ud800", HOSTILE, [], [[]], {}, {"a": 1}, [1, 2], 2**63)


def odd_json(content: Any, rng: random.Random) -> Any:
    """The same with one value, at any depth, taken out or replaced by one that does not belong there."""
    places: list[list[Any]] = [[]]
    for place in places:
        value = reduce(lambda inner, key: inner[key], place, content)
        keys = value if isinstance(value, dict) else range(min(6, len(value))) if isinstance(value, list) else ()
        places += [[*place, key] for key in keys]
    if not (place := rng.choice(places)):
        return rng.choice(ODD)
    parent = reduce(lambda inner, key: inner[key], place[:-1], content)
    if rng.random() < 0.2:
        del parent[place[-1]]
    else:
        parent[place[-1]] = rng.choice(ODD)
    return content


def damage(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.unlink()
    kind = rng.choice(
        ["missing", "short", "flipped", "noise", "folder", "pipe", "nowhere", "loop", "deep", *["odd"] * 4]
    )
    if kind == "short":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == "flipped":
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 20])):
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        path.write_bytes(flipped)
    elif kind == "noise":
        path.write_bytes(rng.randbytes(300))
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("nowhere", "loop"):
        path.symlink_to(path if kind == "loop" else path / "nowhere")
    elif kind == "deep":
        path.write_bytes(b"[" * 100_000)
    elif kind == "odd" and path.suffix == ".json":
        path.write_text(json.dumps(odd_json(json.loads(content), rng)))
    elif kind == "odd":
        lines = content.decode(errors="replace").splitlines()
        i = rng.randrange(len(lines))
        values = ["", "x", "[1, 2]", "{a: b}", "1e999", "-5", "2024-13-45", "&a [*a]", "null", "9" * 5000]
        if path.suffix == ".jsonl":
            lines[i] = json.dumps(odd_json(json.loads(lines[i]), rng))
        else:
            lines[i] = f"{lines[i].partition(':')[0]}: {rng.choice(values)}"
        path.write_text("\n".join(lines), errors="surrogateescape")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of both kinds that have everything a page can show."""
    place = tmp_path_factory.mktemp("whole")
    path = pretrain_run(place / "run", num_epochs=2)
    evaluation(path / "evaluation", "runs/run", 0.7)
    evaluation(path / "evaluation" / "random-run", "random:runs/run", 0.5)
    picture(path / "reconstructions" / "over-time.png")
    picture(path / "analysis" / "grn.png")
    layer = {"name": "stages.0.0", "cosine_distance": 0.41, "effective_rank": None}
    (path / "analysis" / "analysis.json").write_text(json.dumps({"models": [{"name": "run", "layers": [layer]}]}))
    (path / "bad_files.txt").write_text("a.png: it is none\n")
    for name, init in (("tuned", "x"), ("scratch", None)):
        finetune_run(place / name, 0.7, init=init)
    return place


@pytest.mark.parametrize("seed", range(int(os.environ.get("FCMAE_FUZZ", "25"))))  # more, to try harder
def test_a_page_is_made_of_runs_in_any_state(whole: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    runs = [Path(shutil.copytree(path, tmp_path / path.name)) for path in sorted(whole.iterdir())]
    files = sorted(path for run in runs for path in run.rglob("*") if path.is_file())
    for path in sorted(set(rng.choices(files, k=rng.choice([1, 2, 4])))):
        damage(path, rng)
    page = text(report(runs, tmp_path / "page.html"))
    assert page.count("<h3>What was run</h3>") == 3 and HOSTILE not in page


def test_a_pipe_in_place_of_the_record_of_starts_does_not_hang(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    (run / "environment.json").unlink(missing_ok=True)
    os.mkfifo(run / "environment.json")
    (run / "train.log").write_text("2026-01-02 03:04:05 begun\n")
    assert last_state(run) == "cut off"


def test_a_run_without_its_config_is_shown_by_what_is_left(whole: Path, tmp_path: Path) -> None:
    for name, kind in (("run", "pretraining"), ("tuned", "fine-tuning")):
        path = Path(shutil.copytree(whole / name, tmp_path / name))
        (path / "config.yaml").unlink()
        page = text(report([path]))
        assert f">{name} ({kind})</h2>" in page and "the kind of run is guessed by its other files" in page
        assert series(path, "loss")["y"] == traces(page, "scatter")[0]["y"]


def test_what_is_no_run_is_told_beside_those_that_are(whole: Path, tmp_path: Path) -> None:
    page = text(report([tmp_path, whole / "run", tmp_path / "nowhere"], tmp_path / "page.html"))
    assert "Runs that cannot be read" in page and page.count("holds no run of fcmae") == 2
    with pytest.raises(ValueError, match="holds no run of fcmae"):
        report([tmp_path / "nowhere"], tmp_path / "other.html")


def test_a_run_that_may_not_be_read_is_told(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fcmae.atomic.Path.read_bytes", refuse)
    page = text(report([whole / "run"], tmp_path / "page.html"))
    assert page.count("(Permission denied)") >= 5 and "cannot be read as YAML: Permission denied" in page


def test_a_picture_that_claims_much_or_is_another_format_is_not_opened(whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    header = struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", zlib.crc32(header[4:])) + header
    (path / "analysis" / "grn.png").write_bytes(bomb)
    (path / "evaluation" / "confusion.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert text(report([path])).count("cannot be shown") == 2


def test_a_page_that_does_not_fit_on_the_disk_leaves_the_last_one(whole: Path, tmp_path: Path) -> None:
    out = report([whole / "run"], tmp_path / "page.html")
    before = text(out)
    with file_limit(100_000), pytest.raises(OSError, match=r"page\.html"):
        report([whole / "tuned"], out)
    assert text(out) == before and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("how", ["failed", "stopped", None])
@pytest.mark.parametrize(("epochs", "where"), [("6", "epoch 6 of 6"), ("9", "epoch 6 of 9")])
def test_how_a_run_ended_before_its_time_is_told(tmp_path: Path, how: Ended | None, epochs: str, where: str) -> None:
    path = pretrain_run(tmp_path / "run")
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 6\n", f"epochs: {epochs}\n", 1))
    (path / "train.log").touch()
    if how is not None:
        record_end(path, how)
    assert f"{how or 'cut off'} at {where}, step 60" in text(report([path]))


def test_a_run_that_has_logged_nothing_is_told(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    (path / "metrics.jsonl").unlink()
    (path / "train.log").touch()
    record_end(path, "failed")
    assert "failed, nothing logged yet" in text(report([path]))


def test_a_run_of_a_fraction_of_an_epoch_that_has_ended_is_finished(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run", num_epochs=1)
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 1\n", "epochs: 1.04\n", 1))  # of 10 steps: 10 in all
    (path / "train.log").touch()
    for is_finished in (False, True):
        if is_finished:
            record_end(path, "finished")
        assert ("finished after 1.04 epochs" in report([path], None).read_text()) == is_finished
