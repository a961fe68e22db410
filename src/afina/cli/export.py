"""`afina export`: a run as other programs read it, asked golden prompts before the command succeeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from afina.cli.show import console, heading, pairs, quiet, table

__all__ = ["export"]

_OF_FILES = ("diffusers", "kohya", "adapter")

FORMATS = "merged, int8, onnx, onnx-int8, gguf, gguf-adapter, diffusers, kohya"


def export(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run, --output of `afina train`; or a file of LoRA for a pipeline, to convert."),
    ] = None,
    name: Annotated[str | None, typer.Option("--format", help=f"One of {FORMATS}.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write (default: RUN/exports/FORMAT)")] = None,
    max_drop: Annotated[
        str, typer.Option(help="How much worse the figure that chose the weights may become on the validation rows.")
    ] = "0.5%",
    base: Annotated[
        str | None,
        typer.Option(help="Of a quantised base: quantised (what its weights stand for) or pristine (the checkpoint's own)."),
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Of a quantised base: share of what the adapter does that may go (default: 0.1)")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of merged weights: auto (the checkpoint's), fp32, bf16 or fp16.")] = "auto",
    quantisation: Annotated[
        str, typer.Option(help="Of GGUF's weights: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.")
    ] = "f16",
    model: Annotated[
        str | None, typer.Option(help="Of a file that is converted: the pipeline it is for, a folder or a hub id.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the export that is in the output folder.")] = False,
    verify: Annotated[Path | None, typer.Option(help="Ask an export its golden prompts again, and write nothing.")] = None,
    check: Annotated[str | None, typer.Option(help="Say what a server would refuse of the run: vllm.")] = None,
) -> None:
    """Write a run as a merged model, int8, ONNX, GGUF or a file of LoRA, and ask it the same questions.

    afina export runs/messages --format int8
    """
    from afina.errors import ConfigError, Problems

    problems = Problems("afina export")
    asked = [o for o, v in (("--format", name), ("--verify", verify), ("--check", check)) if v is not None]
    if len(asked) > 1:
        problems.add(f"{' and '.join(asked)} exclude each other")
    if not asked:
        problems.add(f"--format is missing: one of {FORMATS}")
    if verify is None and run is None:
        problems.add("the run is missing: afina export RUN --format FORMAT")
    if verify is not None and run is not None:
        problems.add(f"--verify {verify} needs no run; leave {run} out")
    if check not in (None, "vllm"):
        problems.add(f"--check {check}: expected vllm")
    is_file = run is not None and run.is_file()
    if model is not None and not is_file:
        problems.add(f"--model {model} goes with a file that is converted; a run knows its base")
    if is_file and run is not None:
        problems.found += _wrong_of_file(run, name, output, model)
    lost = 0.0
    try:
        lost = _share(max_drop)
    except ValueError:
        problems.add(f"--max-drop {max_drop}: expected a share such as 0.5% or 0.005")
    if max_error is not None and max_error < 0:
        problems.add(f"--max-error {max_error:g}: expected 0 or more")
    problems.raise_as(ConfigError)
    quiet()
    if verify is not None:
        _verify(verify)
        return
    assert run is not None
    if is_file:
        assert name is not None
        assert model is not None
        assert output is not None
        from afina.export.lora_files import convert

        count = convert(run, name, model, output)
        heading(f"{name}: {output}")
        pairs({"from": run, "layers": f"{count}, read back: the same factors"})
        return
    if check is not None:
        _check(run)
        return
    from afina.export.exporting import export as write
    from afina.export.format import Settings

    assert name is not None
    settings = Settings(max_drop=lost, base=base, dtype=dtype, quantisation=quantisation)
    if max_error is not None:
        settings = Settings(**{**vars(settings), "max_error": max_error})
    _show(write(run, name, output, settings, overwrite=overwrite, tell=_tell))


def _wrong_of_file(file: Path, name: str | None, output: Path | None, model: str | None) -> list[str]:
    """What a file cannot be converted for."""
    found = []
    if file.suffix != ".safetensors":
        found.append(f"{file} is a file; give the folder of a run, or a .safetensors file of LoRA to be converted")
    if name not in (None, *_OF_FILES):
        found.append(f"--format {name}: a file is converted into {', '.join(_OF_FILES)}")
    if model is None:
        found.append("--model is missing: the pipeline that the file is for, whose layers say what its names mean")
    if output is None:
        found.append("--output is missing: the folder to write into")
    elif output.is_dir() and any(output.iterdir()):
        found.append(f"--output {output} exists and is not empty; take another folder")
    return found


def _tell(line: str) -> None:
    console(stderr=True).print(f"  {line}", markup=False)


def _share(text: str) -> float:
    """`0.5%` or `0.005`; raises ValueError."""
    number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= number <= 1:
        raise ValueError(text)
    return number


def _show(done: Any) -> None:
    heading(f"{done.format}: {done.folder}")
    figures = {"size": _size(done.bytes)}
    if done.merged_bytes and done.bytes != done.merged_bytes:
        share = done.bytes / done.merged_bytes
        figures["size"] += f", {share:.2f} of the merged model's {_size(done.merged_bytes)}"
    if done.speed is not None:
        figures["speed"] = (
            f"{done.speed.after:.0f} rows a second, the merged model {done.speed.before:.0f}: {done.speed.ratio:.1f} times "
            f"(of processor time {done.speed.cpu:.1f}; medians of alternating rounds, threads: {done.speed.threads})"
        )
    figures["answers"] = done.replay.said()
    for i, note in enumerate(done.notes):
        figures[f"note {i + 1}" if len(done.notes) > 1 else "note"] = note
    pairs(figures)
    if done.figures:
        heading(f"On the {done.rows} validation rows")
        rows = [[title, was, now] for title, was, now in done.shown()]
        table(["", "the run", "this export"], rows, right=["the run", "this export"])
    print()
    console().print(f"Ask again:  afina export --verify {done.folder}", markup=False)


def _verify(folder: Path) -> None:
    from afina.export.exporting import verify

    replayed, name = verify(folder)
    heading(f"{name}: {folder}")
    pairs({"files": "as they were written", "answers": replayed.said()})


def _check(run: Path) -> None:
    from afina.export.vllm import refusals

    found = refusals(run)
    if not found:
        console().print(f"vLLM can serve {run} as it is.", markup=False)
        return
    heading(f"vLLM would refuse {run}:")
    for line in found:
        console().print(f"  - {line}", markup=False)
    raise typer.Exit(1)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
