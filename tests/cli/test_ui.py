"""`afina ui` in a browser: trainings are started, watched and stopped; base and adapter answer side by side."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))

from every_task import case

CHROMIUM = Path("/usr/bin/chromium")
pytest.importorskip("gradio", reason="needs afina[ui]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("diffusers", reason="needs afina[diffusion]")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason="chromium is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of the libraries around the browser
]
WAIT = 90_000  # milliseconds, on a slow machine


@pytest.fixture
def served(tmp_path):
    """Where the page of `afina ui` is, over a folder of runs; it ends as Ctrl-C and SIGTERM end it."""
    with subprocess.Popen(
        [sys.executable, "-m", "afina", "ui", str(tmp_path / "runs"), "--port", "0"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as server:  # fmt: skip
        try:
            assert select.select([server.stdout], [], [], WAIT / 1000)[0], "it says nothing"
            line = server.stdout.readline()
            assert "Ctrl-C ends it" in line, line + server.stdout.read()
            yield line.split()[0]
        finally:
            server.terminate()
            server.wait(60)
        said = server.stdout.read()
        assert server.returncode == 0
        assert "Traceback" not in said, said


@pytest.fixture
def page(served):
    """The page in a browser; it may ask nobody but its server."""
    others = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1280, "height": 1100})
        shown.on("request", lambda r: others.append(r.url) if not r.url.startswith((served, "data:", "blob:")) else None)
        shown.set_default_timeout(WAIT)
        playwright.expect.set_options(timeout=WAIT)
        shown.goto(served)
        yield shown
        browser.close()
    assert others == []


def seen(page, name):
    """A picture of the page in the folder that AFINA_SCREENSHOTS names, for people."""
    if folder := os.environ.get("AFINA_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def test_trainings_are_started_watched_stopped_and_compared(page, tmp_path):
    import diffusion_bases

    from afina.training.run import prepare

    expect, runs = playwright.expect, tmp_path / "runs"
    said, printed = page.locator("#said"), page.locator("#printed textarea")
    recipe = case("sequence_classification", tmp_path / "data")

    # what is wrong is told together, and nothing is started
    page.get_by_label("Data").fill(str(recipe.data.file))
    page.get_by_label("Model").fill(recipe.model)
    page.get_by_label("Name of the run").fill("../words")
    page.get_by_label("More options").fill("r=2 'oops")
    page.locator("#start").click()
    expect(page.get_by_text("'../words' is no name of a folder")).to_be_visible()
    expect(page.get_by_text("No closing quotation")).to_be_visible()
    seen(page, "wrong")
    page.get_by_test_id("toast-close").click()
    assert not runs.exists()

    # a training is watched and stopped
    page.get_by_label("Name of the run").fill("words")
    page.get_by_label("Epochs").fill("5000")
    page.get_by_label("More options").fill("r=2 --precision fp32 --max-truncated 1")
    page.locator("#start").click()
    expect(page.locator("#start")).to_be_disabled()
    expect(said).to_contain_text("loss")
    expect(page.locator("#curve canvas, #curve svg.marks").first).to_be_visible()
    seen(page, "training")
    page.locator("#stop").click()
    expect(said).to_contain_text("stopped; a checkpoint is written")
    assert list((runs / "words" / "checkpoints").iterdir())
    seen(page, "stopped")

    # pictures of one subject
    diffusion_bases.write_pictures(tmp_path / "dog", 3)
    page.get_by_label("pictures of one subject").check()
    page.get_by_label("Data").fill(str(tmp_path / "dog"))
    page.get_by_label("Model").fill(str(diffusion_bases.pipeline_folder("sd", tmp_path)))
    page.get_by_label("with a rare word").fill("a photo of sks dog")
    page.get_by_label("Steps").fill("3")
    page.get_by_label("Name of the run").fill("dog")
    page.get_by_label("More options").fill("r=2 --precision fp32 task.show_steps=2 task.show_pictures=0")
    page.locator("#start").click()
    expect(said).to_contain_text("done")
    assert (runs / "dog" / "report.html").is_file()
    assert "$ afina dreambooth" in printed.input_value()
    seen(page, "subject")

    # both are asked, with the adapter and without
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator("#run input")).to_have_value("dog")
    page.locator("#prompt textarea, #prompt input").first.fill("a dog in the snow")
    page.locator("#draw").click()
    for which in ("#before img", "#after img"):
        expect(page.locator(which)).to_be_visible()
    seen(page, "drawn")
    prepare(recipe, runs / "answers").execute()
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#run input").click()
    page.get_by_role("option", name="answers").click()
    page.locator("#question textarea").fill("w1 late w2")
    page.locator("#ask").click()
    expect(page.locator("#answers")).to_contain_text("p(")
    page.locator("#pair textarea").fill("w3")
    page.locator("#ask").click()
    expect(page.get_by_text("this run reads one text")).to_be_visible()
    seen(page, "answered")
