"""Reports, cards and comparisons of a real run of every task, on the tiny bases of `tests/tasks`."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import tiny_bases

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
sys.path.insert(0, str(Path(__file__).parent))

from every_task import CASES, EVERY, finished
from pages import EVIL, Page

from afina.data.boxes import read_boxes
from afina.data.pictures import picture_size
from afina.errors import CheckpointError, ConfigError
from afina.report.answer import headline
from afina.report.card import card, write_card
from afina.report.cells import answers_in, names_in, number_in, tagged
from afina.report.comparison import compare_runs
from afina.report.folder import read_run
from afina.report.html import render, write_report
from afina.report.players import player
from afina.report.scores import intervals, row_scores
from afina.report.usage import command_lines, python_lines
from afina.tasks.catalogue import tasks
from afina.tasks.entities import Scheme

pytestmark = pytest.mark.xdist_group("every task")
CHROMIUM = Path("/usr/bin/chromium")
PICTURES = ("image_classification", "semantic_segmentation")
TAGGED = ("token_classification", "document_token_classification")
CLASSES = ("sequence_classification", "image_classification", "audio_classification")
COMMON = {"answer", "figures", "model", "training", "mistakes", "data", "lengths", "cost", "use"}
OWN = {
    "sequence_classification": {"confusions", "classes", "calibration"},
    "image_classification": {"confusions", "classes", "calibration"},
    "audio_classification": {"confusions", "classes", "calibration"},
    "multi_label_classification": {"classes", "calibration"},
    **{name: {"classes"} for name in TAGGED},
    "regression": {"numbers"},
    "sentence_similarity": {"numbers"},
    **{name: {"written"} for name in ("dpo", "orpo", "kto")},
}


@pytest.fixture
def made():
    """The folder of a task's run."""
    return lambda name: finished(name)[0] / "run"


def test_every_task_is_here():
    assert set(EVERY) == set(tasks())


@pytest.mark.parametrize("name", CASES)
def test_the_page_has_what_the_task_has(name, made):
    run = read_run(made(name))
    text = (made(name) / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    page.check_harmless()
    one_length = {"lengths"} if name in PICTURES else set()
    assert set(page.sections) == (COMMON | OWN.get(name, set())) - one_length
    assert all(words.strip() for words in page.sections.values())
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    first = headline(run)
    assert run.figures[first].said(run.test[first]) in page.sections["answer"]
    for key, shown in run.figures.items():
        assert shown.title in page.sections["figures"]
        assert shown.said(run.test[key]) in page.sections["figures"]
    assert len(run.baselines) > 0
    for title in run.baselines:
        assert title in page.sections["answer"] + page.sections["figures"]
    begins = [next(iter(row.given.values()))[:20] if name not in TAGGED else "" for row in run.rows]
    shown = [words for words in begins if words in text]
    assert shown, "no text of a test row is on the page"
    assert [tag for tag, _ in page.tags].count("caption") == [tag for tag, _ in page.tags].count("table")
    assert all("aria-label" in a for tag, a in page.tags if tag == "svg" and a.get("role") == "img")


@pytest.mark.parametrize("name", CASES)
def test_intervals_hold_the_figure(name, made):
    run = read_run(made(name))
    found = intervals(run)
    for key, (low, high) in found.items():
        assert low <= run.test[key] <= high, key
    if name not in ("causal_lm", "seq2seq", "semantic_segmentation", "speech_recognition"):
        assert found
    what, scores = row_scores(run)
    assert len(scores) == len(run.rows)
    mean = {
        "right rows": run.test.get("accuracy" if name in CLASSES else "subset_accuracy"),
        "F1 of a row": run.test.get("f1"), "absolute error": -run.test["mae"] if "mae" in run.test else None,
    }.get(what)  # fmt: skip
    if mean is not None and name not in TAGGED:
        assert np.mean(scores) == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("name", TAGGED)
def test_the_report_reads_entities_as_the_task_does(name, made):
    run = read_run(made(name))
    scheme, counts = Scheme(run.test["scheme"]), np.zeros(3)
    for row in run.rows:
        said = tagged(run, row)
        true, given = set(scheme.entities(said.true)), set(scheme.entities(said.answered))
        counts += (len(true & given), len(given), len(true))
    right, answered, present = counts
    assert present == run.test["entities"] > 0
    assert 2 * right / (answered + present) == pytest.approx(run.test["f1"])


def test_reports_and_comparisons_need_no_torch(made):
    folders = [str(made(name)) for name in CASES]
    code = f"""
import sys
from pathlib import Path
from afina.report.card import card
from afina.report.comparison import compare_runs
from afina.report.folder import read_run
from afina.report.html import render, write_report
for folder in map(Path, {folders!r}):
    render(read_run(folder)), card(read_run(folder)), compare_runs([folder, folder]), write_report(folder)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def boxes_of(run, row):
    """In thousandths of the page."""
    words, size = json.loads(row.given["text"]), picture_size(row.given["image"])
    return read_boxes(row.given["boxes"], words, run.metrics["task"]["options"]["boxes"], size)[0]


def ask(name, run, row):
    """The lines of the page with the texts of a row in the places that are left open."""
    lines, texts = python_lines(run), [cell for role, cell in row.given.items() if role != "label"]
    if name == "token_classification":
        return lines.replace('["A", "list", "of", "words"]', texts[0])
    if name == "document_token_classification":
        lists = {'["A", "list", "of", "words"]': texts[0], "[[0, 0, 1000, 1000]] * len(words)": f"{boxes_of(run, row)}"}
        for there, text in lists.items():
            assert there in lines
            lines = lines.replace(there, text)
        return lines.replace('"..."', repr(row.given["image"]))
    if name == "question_answering":
        return lines.replace('"...?", "..."', f"{texts[0]!r}, {texts[1]!r}")
    if name == "reranking":
        return lines.replace('"...", ["..."]', f"{texts[0]!r}, [{texts[1]!r}]")
    if name in ("sentence_similarity", "reward"):
        return lines.replace('"...", "..."', f"{texts[0]!r}, {texts[1]!r}")
    assert lines.count('"..."') + lines.count("'...'") == 1, lines
    return lines.replace('"..."', repr(texts[0])).replace("'...'", repr(texts[0]))


@pytest.mark.parametrize("name", CASES)
def test_the_python_lines_answer_as_the_run_did(name, made):
    run = read_run(made(name))
    for row in run.rows[:3]:
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(ask(name, run, row), "page", "exec"), {})
        said = out.getvalue().rstrip("\n")
        if name in CLASSES:
            wanted = {label: float(row.more[f"p({label})"]) for label in run.labels}
            assert eval(said) == pytest.approx(wanted, abs=2e-6)
        elif name == "multi_label_classification":
            assert sorted(eval(said)) == ([] if row.answer == "[]" else names_in(row.answer))
        elif name == "semantic_segmentation":
            shares = {label: f"{share:.1%}" for label, share in eval(said).items()}
            assert all(f"{label} {shares[label]}" in row.answer for label in shares if shares[label] != "0.0%")
        elif name == "grpo":
            known = [*tiny_bases.WORDS, *(word for words in tiny_bases.TELLING.values() for word in words)]
            assert set(said.split()) <= {*known}
        elif name in ("regression", "sentence_similarity", "reward"):
            wanted = row.more["similarity"] if name == "sentence_similarity" else row.answer
            assert float(said) == pytest.approx(float(wanted), abs=1e-4)
        elif name == "reranking":
            assert eval(said)[0] == (pytest.approx(float(row.answer), abs=1e-4), row.given["text_pair"])
        elif name in TAGGED:
            assert [tag for _, tag in eval(said)] == row.more["answer_tags"].split()
        elif name == "question_answering":
            assert said == row.answer
        else:
            assert said.strip() == row.answer or not row.answer  # an answer is written where the recipe asks for it


@pytest.mark.parametrize("name", CASES)
def test_the_lines_of_the_terminal_are_known_to_it(name, made, capsys, monkeypatch):
    from afina.cli.main import main

    for line in command_lines(read_run(made(name)), made(name)).splitlines():
        words = line.split()
        monkeypatch.setattr(sys, "argv", [*words[:2], "--help"])
        with pytest.raises(SystemExit):
            main()
        told = capsys.readouterr().out
        assert all(word in told for word in words if word.startswith("--")), line


@pytest.mark.parametrize("name", CASES)
def test_the_card_is_read_by_the_hub_library(name, made):
    from huggingface_hub import ModelCard

    folder = made(name)
    text = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    read, run = ModelCard(text), read_run(folder)
    first = next(iter(run.figures))
    assert read.data.library_name == "peft"
    assert read.data.pipeline_tag
    assert {"afina", "lora"} == set(read.data.tags)
    values = {result.metric_type: result.metric_value for result in read.data.eval_results}
    assert values[first] == pytest.approx(run.test[first], abs=1e-5)
    for part in ("licence", "## Limits", "from_pretrained", "test rows", "rows.jsonl", *run.baselines):
        assert part in text, part
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_card_that_a_person_wrote_stays(made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made("regression"), folder)
    path = folder / "adapter" / "README.md"
    path.write_text("# mine\n")
    write_card(folder)
    assert path.read_text() == "# mine\n"
    path.unlink()
    write_card(folder)
    assert path.read_text(encoding="utf-8") == card(read_run(folder))


def hostile(folder):
    """Every text of the test rows, and every name that a user chose, tries to become markup."""
    report = json.loads((folder / "data" / "data_report.json").read_text(encoding="utf-8"))
    roles = list(report["columns"])
    report["columns"] = {role: f"{EVIL}{name}" for role, name in report["columns"].items()}
    report["file"] = EVIL
    (folder / "data" / "data_report.json").write_text(json.dumps(report), encoding="utf-8")
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    rows[0][1 : 1 + len(roles)] = report["columns"].values()
    name = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["task"]["name"]
    for row in rows[1:]:
        for place, role in enumerate(roles, 1):
            if role == "label" and name not in ("causal_lm", "seq2seq"):
                continue
            if row[place].startswith("["):
                row[place] = json.dumps([f"{word}{EVIL}" for word in json.loads(row[place])])
            else:
                row[place] += f' {EVIL} " onload="x \x00\u202e'
        if name in ("causal_lm", "seq2seq", "question_answering"):
            row[1 + len(roles)] = f"{EVIL}</dd>"
    with (folder / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_no_text_becomes_markup(name, made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made(name), folder)
    text = render(read_run(hostile(folder)))
    Page(text).check_harmless()
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("name", CASES)
def test_a_page_stays_small_whatever_the_texts(name, made, tmp_path):
    folder, long = tmp_path / "run", "<&漢" * 20_011
    shutil.copytree(made(name), folder)
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    for row in rows:
        row[1] = json.dumps([long + word for word in json.loads(row[1])]) if row[1].startswith("[") else row[1] + long
        if name in ("question_answering", "sentence_similarity"):
            row[2] += long
    with (folder / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    assert len(render(read_run(folder)).encode()) < 1_500_000


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_compared_with_itself_and_with_a_worse_one(name, made, tmp_path):
    first = made(name)
    same = compare_runs([first, first])["pairs"][0]
    assert same["same_test_rows"]
    assert same["p"] == 1.0
    if name not in ("regression", "question_answering"):
        return
    worse = tmp_path / "worse"
    shutil.copytree(first, worse)
    with (worse / "predictions.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    place = len(read_run(first).data["columns"]) + 1
    for row in rows:
        row[place] = str(float(row[place]) + 100) if name == "regression" else "quite another answer"
        if name == "question_answering":
            row[place + 1] = "no"
    if name == "question_answering":
        metrics = json.loads((worse / "metrics.json").read_text())
        metrics["test"]["exact_match"] = 0.0
        (worse / "metrics.json").write_text(json.dumps(metrics))
    with (worse / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *reversed(rows)])  # in another order
    found = compare_runs([first, worse])["pairs"][0]
    assert found["same_test_rows"]
    scores = row_scores(read_run(first))[1]
    if name == "regression":
        assert found["difference"] > 80
        assert found["p"] < 0.01
    elif "difference" in found:
        assert found["difference"] == pytest.approx(scores.mean())


def test_runs_of_different_tasks_are_not_compared(made, capsys, monkeypatch):
    from afina.cli.main import main

    with pytest.raises(ConfigError, match=r"different tasks: .*\(regression\).*\(seq2seq\)"):
        compare_runs([made("regression"), made("seq2seq")])
    monkeypatch.setattr(sys, "argv", ["afina", "compare", str(made("regression")), str(made("regression"))])
    with pytest.raises(SystemExit):
        main()
    assert "more than once" in capsys.readouterr().err


def test_the_table_of_a_comparison_shows_the_tasks_figures(made, tmp_path, capsys, monkeypatch):
    from afina.cli.main import main

    other = tmp_path / "other"
    shutil.copytree(made("regression"), other)
    monkeypatch.setattr(sys, "argv", ["afina", "compare", str(made("regression")), str(other)])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    said = capsys.readouterr().out
    for part in ("RMSE", "Spearman", "95 % interval", "by absolute error, the same on average"):
        assert part in said


def test_what_is_missing_is_named(made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made("token_classification"), folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    path = folder / "metrics.json"
    for broken, told in (
        ({**metrics, "task": {}}, "lacks task.name"),
        ({**metrics, "figures": {"f1": 3}}, "figures.f1 is '3'"),
        ({**metrics, "figures": {"speed": {"title": "speed"}}}, "lacks test.speed"),
        ({**metrics, "test": {**metrics["test"], "rows": 7}}, "not of the same run"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=told):
            write_report(folder)


def test_cells_are_read_as_the_tasks_write_them():
    assert names_in('["b", "a c"]') == ["b", "a c"]
    assert names_in("b| a") == names_in("a;b") == names_in("a, b") == ["a", "b"]
    assert names_in("[]") == names_in("") == []
    assert names_in("[draft") == ["[draft"]
    assert number_in("1e3") == 1000
    assert number_in("much") is None
    assert answers_in('{"text": ["x"], "answer_start": [3]}') == [("x", 3)]
    assert answers_in("x") == [("x", None)]
    assert answers_in("") == answers_in("{broken") == []


@pytest.mark.skipif(not CHROMIUM.exists(), reason="/usr/bin/chromium is not installed")
@pytest.mark.parametrize("name", ["token_classification", "question_answering", "seq2seq", "regression"])
def test_a_browser_opens_it_without_errors(name, made, tmp_path):
    path = made(name) / "report.html"
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,800"]  # fmt: skip
    said = subprocess.run([*words, path.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in said.stderr
    assert "How to use it" in said.stdout


def test_recordings_are_played_from_the_page(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (200_003, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a <b>.flac", sound, 44100)
    page = str(player(str(tmp_path / "a <b>.flac")))
    assert "a &lt;b&gt;.flac, the first 3.6 seconds" in page
    held = base64.b64decode(page.split("base64,")[1].split('"')[0])
    heard, rate = soundfile.read(io.BytesIO(held), dtype="float32")
    assert rate == 44100
    np.testing.assert_allclose(heard, sound[:160_000].mean(1), atol=1e-4)
    soundfile.write(tmp_path / "short.wav", sound[:101], 8000)
    assert "the first" not in player(str(tmp_path / "short.wav"))
    assert "the file is no longer there" in player(str(tmp_path / "gone.wav"))
    (tmp_path / "bad.wav").write_text("no")
    assert "not to be heard" in player(str(tmp_path / "bad.wav"))
