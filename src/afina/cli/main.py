"""The command `afina`. Nothing heavy is imported here, so that `afina --help` is there at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from afina import __version__
from afina.cli import (
    check,
    compare,
    dreambooth,
    evaluate,
    export,
    methods,
    plan,
    predict,
    prepare,
    report,
    serve,
    sweep,
    targets,
    tasks,
    train,
    ui,
)
from afina.cli.launch import LOST
from afina.cli.show import fail
from afina.errors import AfinaError, LostProcessError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Tune pretrained transformers to your own data by training a small number of parameters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("prepare")(prepare.prepare)
app.command("check")(check.check)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("dreambooth")(dreambooth.dreambooth)
app.command("sweep")(sweep.sweep)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("serve")(serve.serve)
app.command("ui")(ui.ui)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("tasks")(tasks.tasks)
app.command("methods")(methods.methods)
app.command("targets")(targets.targets)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"afina {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    """Options that come before the command."""


_UNEXPECTED = "This was not expected; with --debug the command shows where it happened."


def main() -> None:
    """Run a command; what the user can mend is printed as one message, and the exit code is 1."""
    debug = "--debug" in sys.argv
    if debug and "--debug" in sys.argv[2:]:  # also after the command
        sys.argv = [sys.argv[0], "--debug", *(a for a in sys.argv[1:] if a != "--debug")]
    try:
        app()
    except AfinaError as error:
        if debug:
            raise
        if isinstance(error, LostProcessError) and error.told:
            sys.exit(LOST)
        fail(str(error), LOST if isinstance(error, LostProcessError) else 1)
    except OSError as error:
        if debug:
            raise
        if error.filename is None or error.strerror is None:  # of a library, in its own words
            fail(f"{type(error).__name__}: {error}\n{_UNEXPECTED}")
        fail(f"{error.filename}: {error.strerror}. Give a file or folder that is there and may be read and written")
    except KeyboardInterrupt:
        fail("stopped")
    except Exception as error:
        if debug:
            raise
        fail(f"{type(error).__name__}: {error}\n{_UNEXPECTED}")
