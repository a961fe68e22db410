"""The report is made from the folder alone, holds no markup of the user's, stays small, and says what is broken."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_runs import made_run
from pages import EVIL, Page

from afina.errors import CheckpointError
from afina.report.comparison import compare_runs
from afina.report.folder import read_run
from afina.report.html import write_report
from afina.report.mistakes import suspected, worst
from afina.report.statistics import (
    Bin,
    bootstrapped,
    calibration,
    calibration_error,
    histogram,
    macro_f1_interval,
    mcnemar,
    middle_95,
    resampled_sums,
    sign_flip,
    wilson,
)

CHROMIUM = Path("/usr/bin/chromium")


def page_of(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


def test_the_answer_comes_first_and_every_section_is_there(tmp_path):
    folder = made_run(tmp_path / "run", rows=179)
    text, page = page_of(folder)
    run = read_run(folder)
    wrong = int((~run.right).sum())
    said = " ".join(page.words)
    assert f"{wrong} of 179 wrong" in said
    assert text.index(f"{wrong} of 179 wrong") < text.index("<h2>")
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert all("aria-label" in a for tag, a in page.tags if tag == "svg" and a.get("role") == "img")
    assert [t for t, _ in page.tags].count("table") == [t for t, _ in page.tags].count("caption") > 3
    for part in ("2 rows dropped", "1 text", "some/base", "97 of 1,009", "epoch 2 kept", "1.2 KiB", "3.0 GiB"):
        assert part in said, part


def test_nothing_a_user_wrote_becomes_markup_or_a_request(tmp_path):
    hostile = [
        EVIL,
        'x" onload="y',
        "</style><img src=http://x/y>",
        "\u202eright to left",
        "שלום עולם",
        "a\x00b\u2028c\x0bd",
    ]
    folder = made_run(tmp_path / 'r"<un>', labels=[EVIL, "a & b", "<!--x"], texts=[f"{t} {EVIL}" for t in hostile],
                      columns=(EVIL, "<b>label"), skill=0.0)  # fmt: skip
    text, page = page_of(folder)
    page.check_harmless()
    assert "http://" not in re.sub(r"&lt;img src=http://x/y&gt;", "", text)
    assert "\x00" not in text
    assert any(a.get("dir") == "auto" for _, a in page.tags)


@pytest.mark.parametrize(("classes", "rows"), [(2, 10_000), (151, 10_000)])
def test_small_whatever_the_rows_and_texts(tmp_path, classes, rows):
    labels = [f"class number {i} " + "<&>" * 50 for i in range(classes)]
    folder = made_run(tmp_path / "run", labels=labels, rows=rows, texts=["<&漢" * 1507], skill=0.5)
    text, page = page_of(folder)
    assert len(text.encode()) < 1_000_000
    assert sum(a.get("class") == "matrix" for _, a in page.tags) == (classes == 2)
    assert ("taken for others" in text) == (classes == 151)


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.json", "log.jsonl", "data/data_report.json", "predictions.csv",
                                  "adapter/adapter_config.json", "adapter/adapter_model.safetensors"])  # fmt: skip
def test_a_missing_or_broken_file_is_named(tmp_path, name):
    folder = made_run(tmp_path / "run")
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        write_report(folder)
    for broken in (
        () if name.endswith("safetensors") else (b"", b"\xff\xfe\x00", whole[: len(whole) // 2] + b'{"', b"[1]", b"{}")
    ):
        if name == "log.jsonl" and broken == b"":
            continue
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=name):
            write_report(folder)
    assert not (folder / "report.html").exists()


def test_predictions_of_another_run_are_refused(tmp_path):
    a, b = made_run(tmp_path / "a"), made_run(tmp_path / "b", seed=1, skill=0.0)
    shutil.copy(a / "predictions.csv", b / "predictions.csv")
    with pytest.raises(CheckpointError, match="not of the same run"):
        read_run(b)


def test_statistics():
    assert wilson(8, 179) == pytest.approx((0.0228, 0.0857), abs=5e-4)
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    for hits in range(14):
        low, high = wilson(hits, 13)
        assert 0 <= low <= hits / 13 <= high <= 1
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(2, 9) == mcnemar(9, 2) == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert 0 < mcnemar(3000, 3400) < 1e-5
    assert macro_f1_interval([[7, 0], [0, 3]]) == (1.0, 1.0)
    low, high = macro_f1_interval([[73, 4], [4, 98]])
    assert low < 0.9544 < high
    bins = calibration(np.array([0.5, 0.95, 1.0]), np.array([True, False, True]))
    assert [b.rows for b in bins] == [1, 2]
    assert calibration_error(bins) == pytest.approx((0.5 + 2 * abs(0.5 - 0.975)) / 3)
    assert calibration_error([Bin(0.9, 1.0, 10, 9, 0.9)]) == 0.0


def test_a_bootstrap_covers_what_it_should_and_repeats_itself():
    chance = np.random.default_rng(1)
    values = chance.normal(3.0, 2.0, size=(211, 1))
    low, high = middle_95(resampled_sums(values)[:, 0] / 211)
    error = values.std() / 211**0.5
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.4 * error)
    assert (low, high) == middle_95(resampled_sums(values)[:, 0] / 211)
    again = middle_95(bootstrapped(lambda rows: float(values[rows].mean()), 211, 1000))
    assert again == pytest.approx((low, high), abs=0.4 * error)
    assert len(bootstrapped(lambda rows: None if 0 in rows else 1.0, 3, 97)) < 97


def test_sign_flips_agree_with_counting_all_of_them():
    differences = np.array([0.5, -0.25, 1.0, 2.0, 0.125, 0.75, -0.5, 1.5])
    every = [abs(sum(d * (1 if i >> k & 1 else -1) for k, d in enumerate(differences))) for i in range(2**8)]
    exact = np.mean([total >= abs(differences.sum()) - 1e-12 for total in every])
    assert sign_flip(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip(-differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip(np.zeros(7)) == 1.0
    assert sign_flip(np.concatenate([differences, np.zeros(1000)])) == sign_flip(differences)


@pytest.mark.parametrize("values", [[7], [3, 3, 3], list(range(97)), [1, 100_003], [0, 1, 1, 23]])
def test_a_histogram_holds_every_row_once(values):
    found = histogram(values)
    assert sum(found["counts"]) == len(values)
    assert len(found["edges"]) == len(found["counts"]) + 1 <= 26
    assert found["edges"][0] <= min(values)
    assert found["edges"][-1] > max(values)
    for low, high, count in zip(found["edges"], found["edges"][1:], found["counts"], strict=False):
        assert count == sum(low <= value < high for value in values)


def test_a_label_is_suspected_only_where_answers_as_sure_are_nearly_always_right():
    rows = 211
    p = np.tile([0.99, 0.01], (rows, 1))
    truth = np.zeros(rows, int)
    truth[3] = 1
    answer = np.zeros(rows, int)
    assert suspected(truth, answer, p) == {3}
    truth[:29] = 1
    assert suspected(truth, answer, p) == set()
    p[5] = [0.999, 0.001]
    assert worst(truth, answer, p)[0] == 5


def test_compare_pairs_rows_and_says_when_it_cannot(tmp_path):
    a, b, c = made_run(tmp_path / "a"), made_run(tmp_path / "b", seed=1, skill=0.0), made_run(tmp_path / "c", rows=43)
    found = compare_runs([a, b, c])
    first, *others = found["pairs"]
    right = [read_run(x).right for x in (a, b)]
    assert first["same_test_rows"]
    assert (first["only_first"], first["only_second"]) == (
        int((right[0] & ~right[1]).sum()),
        int((right[1] & ~right[0]).sum()),
    )
    assert [(p["same_test_rows"], p["shared_rows"], "p" in p) for p in others] == [(False, 43, False)] * 2
    (b / "metrics.json").unlink()
    (c / "log.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)metrics\.json.*log\.jsonl"):
        compare_runs([a, b, c])


@pytest.mark.parametrize("words", [["report"], ["compare", "--json"]])
def test_the_commands(tmp_path, monkeypatch, capsys, words):
    from afina.cli.main import main

    runs = [made_run(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    for extra in ([], ["--json"]) if words[0] == "compare" else ([],):
        typed = ["afina", words[0], *map(str, runs if words[0] == "compare" else runs[:1]), *extra]
        monkeypatch.setattr(sys, "argv", typed)
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        assert "0.95" in (said := capsys.readouterr().out) or str(runs[0]) in said
    monkeypatch.setattr(sys, "argv", ["afina", words[0], str(tmp_path / "none")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(not CHROMIUM.exists(), reason="/usr/bin/chromium is not installed")
def test_a_browser_opens_it_without_errors_or_requests(tmp_path):
    folder = made_run(tmp_path / "run", texts=[EVIL, "plain"], skill=0.3)
    path = write_report(folder)
    asking = tmp_path / "asking.html"
    asking.write_text(path.read_text(encoding="utf-8").replace("</main>", "<img src='http://127.0.0.1:9/x'></main>"))
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
             f"--user-data-dir={tmp_path / 'profile'}", "--disable-background-networking"]  # fmt: skip
    said, caught = (
        subprocess.run([*words, p.as_uri()], capture_output=True, text=True, timeout=60, check=True) for p in (path, asking)
    )
    assert "CONSOLE" in caught.stderr  # the page's own policy refuses and reports whatever would be fetched
    assert "CONSOLE" not in said.stderr
    assert "The worst mistakes" in said.stdout
    assert "<script" not in said.stdout
    page = Page(path.read_text(encoding="utf-8"))
    assert not [a for _, a in page.tags if str(a.get("src") or a.get("href") or "").startswith(("http", "//", "file"))]


def test_axes_hold_no_share_above_one_and_no_half_of_what_is_counted():
    from afina.report.charts import Line, bars, chart

    def numbers(drawn):
        return [float(text) for text in re.findall(r"<text[^>]*>([-0-9.]+)</text>", str(drawn))]

    for value in (1.0, 0.37, 0.0, -2.5):
        drawn = numbers(chart("shares", [Line("a", [(0, value), (3, value)])], described=""))
        assert value in drawn
        assert max(drawn) <= max(value, 3.0)
    assert all(n == round(n) for n in numbers(chart("steps", [Line("a", [(1, 0.0), (2, 7.0)])], described="")))
    assert all(n == round(n) for n in numbers(bars("tokens", [40, 41, 42], [1, 1], x_name="tokens", described="")))
    assert 0.4 in numbers(bars("seconds", [0, 0.5, 1], [3, 4], x_name="seconds", described=""))
