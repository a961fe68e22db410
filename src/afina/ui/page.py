"""The page: what is typed into it becomes words of the command line, which is what runs."""

from __future__ import annotations

import functools
import html
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afina.errors import AfinaError, ConfigError, Problems
from afina.ui.comparing import Compared, runs_below
from afina.ui.job import Job, State

__all__ = ["CSS", "make_page", "words_of"]

CSS = "#printed textarea {font-family: monospace; font-size: 0.8rem}"  # tables are printed

_TEXTS, _SUBJECT = "a file of texts", "pictures of one subject"
_TELL, _GO_ON, _REPLACE = "tell me", "go on with it", "replace it"
_EVERY = 1.0  # seconds between looks at a training
_POINTS = 500  # of the curve


def words_of(what: str, root: Path, values: dict[str, Any]) -> tuple[list[str], Path]:
    """The command line of a training that the page describes, and the folder of its run; empty fields are left out.

    Raises ConfigError with all that the command could not tell.
    """
    problems, more = Problems("the page"), list[str]()
    name = values["name"].strip()
    if not name or name.startswith(".") or set(name) & set("/\\"):
        problems.add(f"Name of the run: {name!r} is no name of a folder, such as first; {root} is where the runs lie")
    try:
        more = shlex.split(values["more"])
    except ValueError as error:
        problems.add(f"More options: {error}: {values['more']!r}")
    problems.raise_as(ConfigError)
    subject, output = what == _SUBJECT, root / name
    command = "dreambooth" if subject else "train"
    if values["there"] == _GO_ON:  # with the recipe that lies there
        return [command, *more, "--resume", f"--output={output}"], output
    options = ["data", "model", "method", "learning_rate", "batch_size"]
    options += ["prompt", "class_prompt", "steps"] if subject else ["task", "text", "text_pair", "label", "epochs"]
    words = [command]
    for key in options:
        if values[key] not in (None, ""):
            words.append(f"--{key.replace('_', '-')}={values[key]}")
    return [*words, *more, *(["--overwrite"] if values["there"] == _REPLACE else []), f"--output={output}"], output


def make_page(root: Path, jobs: list[Job]) -> Any:
    """The page over the runs in a folder, started by its `launch`; what it starts is put behind `jobs`."""
    import gradio as gr

    from afina.core.registry import methods
    from afina.tasks.catalogue import tasks

    compared = Compared(root)

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*given: Any) -> Any:
            try:
                return function(*given)
            except AfinaError as error:
                message = html.escape(str(error)).replace("\n", "<br>")
                raise gr.Error(message, duration=None, print_exception=False) from None

        return run

    @told
    def start(what: str, *given: Any) -> Any:
        if jobs and jobs[-1].running:
            raise ConfigError("a training is running; stop it first")
        jobs.append(Job(*words_of(what, root, dict(zip(fields, given, strict=True)))))
        return look()

    def look() -> Any:
        state = jobs[-1].state() if jobs else State("nothing was started", False)
        said = f"**{state.said}**" + (f", loss {state.steps[-1]['loss']:.4f}" if state.steps else "")
        buttons = [gr.Button(interactive=not state.running), gr.Button(interactive=state.running and not jobs[-1].stopped)]
        return [gr.Timer(active=state.running), said, _curve(state), state.printed, *buttons]

    def stop() -> Any:
        if jobs:
            jobs[-1].stop()
        return look()

    def either(second: bool) -> list[Any]:
        return [gr.Group(visible=not second), gr.Group(visible=second)]

    def refreshed(name: str | None) -> Any:
        found = runs_below(root)
        return gr.Dropdown(choices=found, value=name if name in found else found[0] if found else None)

    @told
    def chosen(name: str | None) -> list[Any]:
        return [*either(bool(name) and compared.draws(str(name))), None, None, None]

    @told
    def asked(name: str | None, text: str, pair: str) -> Any:
        if not name or not text.strip():
            raise ConfigError("choose a run, and type a text")
        return compared.texts(name, text, pair)

    @told
    def drawn(name: str | None, prompt: str, seed: int | None) -> Any:
        if not name or not prompt.strip():
            raise ConfigError("choose a run, and type a prompt")
        return compared.pictures(name, prompt, seed or 0)

    with gr.Blocks(title="afina", analytics_enabled=False) as page:
        gr.Markdown("# afina")
        with gr.Tab("Train"):
            what = gr.Radio([_TEXTS, _SUBJECT], value=_TEXTS, label="Learn from")
            with gr.Row():
                data = gr.Textbox(label="Data", info="file or folder of this machine")
                model = gr.Textbox(label="Model", info="folder or hub id; of texts also minilm, of pictures a pipeline")
                method = gr.Dropdown(sorted(methods()), value="lora", label="Method", info="what is trained")
            with gr.Group() as of_texts, gr.Row():
                of_text = sorted(name for name, task in tasks().items() if not task.kind.media)
                task = gr.Dropdown(of_text, value="sequence_classification", label="Task", info="what is answered")
                text = gr.Textbox(label="Column of the text", info="empty: by its name")
                text_pair = gr.Textbox(label="Column of a second text", info="where the task has one")
                label = gr.Textbox(label="Column of the label", info="or answer; empty: by its name")
                epochs = gr.Number(value=5, precision=0, minimum=1, label="Epochs", info="passes over the rows")
            with gr.Group(visible=False) as of_subject, gr.Row():
                prompt = gr.Textbox(label="Prompt", info="with a rare word: a photo of sks dog")
                class_prompt = gr.Textbox(label="Prompt of its class", info="a photo of a dog; may be empty")
                steps = gr.Number(value=500, precision=0, minimum=1, label="Steps", info="pictures are read again and again")
            with gr.Row():
                name = gr.Textbox(label="Name of the run", value="first", info=f"a folder in {root.name or root}")
                there = gr.Dropdown([_TELL, _GO_ON, _REPLACE], value=_TELL, label="If it is there", info="or was stopped")
                rate = gr.Textbox(label="Learning rate", info="empty: what suits")
                size = gr.Textbox(label="Rows of a step", info="empty: what suits")
                more = gr.Textbox(label="More options", info="as on the command line: r=16 --seed 1")
            with gr.Row():
                begin = gr.Button("Start", variant="primary", elem_id="start")
                end = gr.Button("Stop", interactive=False, elem_id="stop")
            said = gr.Markdown(elem_id="said")
            curve = gr.LinePlot(x="step", y="loss", color="of", color_title="loss on", height=340, elem_id="curve")
            printed = gr.Textbox(label="What it said", lines=14, max_lines=14, autoscroll=True, elem_id="printed")
            timer = gr.Timer(_EVERY, active=False)
        with gr.Tab("Compare") as second:
            with gr.Row():
                run = gr.Dropdown([], label="Run", info="finished ones, the newest first", elem_id="run")
            with gr.Group() as two_answers:
                with gr.Row():
                    question = gr.Textbox(label="Text", lines=2, elem_id="question")
                    pair = gr.Textbox(label="Second text, where the task has one", lines=2, elem_id="pair")
                ask = gr.Button("Ask both", variant="primary", elem_id="ask")
                headers = ["", "with the adapter", "the base alone"]
                answers = gr.Dataframe(headers=headers, label="Answers", interactive=False, wrap=True, elem_id="answers")
                gr.Markdown("Where the task has a head of its own, the base alone answers by chance.", padding=True)
            with gr.Group(visible=False) as two_pictures:
                with gr.Row():
                    wanted = gr.Textbox(label="Prompt", elem_id="prompt")
                    seed = gr.Number(value=0, precision=0, minimum=0, label="Seed")
                draw = gr.Button("Draw both", variant="primary", elem_id="draw")
                buttons: list[Any] = ["download", "fullscreen"]
                look_at: dict[str, Any] = {"type": "pil", "interactive": False, "height": 512, "buttons": buttons}
                with gr.Row():
                    before = gr.Image(label="The base alone", elem_id="before", **look_at)
                    after = gr.Image(label="With the adapter", elem_id="after", **look_at)
        fields = {"data": data, "model": model, "method": method, "task": task, "text": text, "text_pair": text_pair,
                  "label": label, "epochs": epochs, "prompt": prompt, "class_prompt": class_prompt, "steps": steps,
                  "name": name, "there": there, "learning_rate": rate, "batch_size": size, "more": more}  # fmt: skip
        watched = [timer, said, curve, printed, begin, end]
        what.change(lambda chosen: either(chosen == _SUBJECT), what, [of_texts, of_subject])
        begin.click(start, [what, *fields.values()], watched, show_progress="hidden")
        end.click(stop, None, watched, show_progress="hidden")
        timer.tick(look, None, watched, show_progress="hidden")
        page.load(look, None, watched, show_progress="hidden")
        second.select(refreshed, run, run)
        run.change(chosen, run, [two_answers, two_pictures, answers, before, after])
        ask.click(asked, [run, question, pair], answers, concurrency_id="model")  # one at a time: they share what is loaded
        draw.click(drawn, [run, wanted, seed], [before, after], concurrency_id="model")
    return page


def _curve(state: State) -> Any:
    """The loss by steps as a frame, thinned out, and that on the validation rows; None where there is none."""
    import pandas as pd

    kept = state.steps[:: -(-len(state.steps) // _POINTS) or 1]
    points = [(line["step"], line["loss"], "training") for line in kept]
    points += [(line["step"], line["validation_loss"], "validation") for line in state.readings]
    return pd.DataFrame(points, columns=["step", "loss", "of"]) if points else None
