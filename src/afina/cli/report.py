"""`afina report`: make the report of a run again from what lies in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.show import console

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, --output of `afina train`.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write (default: report.html in the run's folder)")
    ] = None,
) -> None:
    """Write report.html: scores, curves, mistakes, data findings and cost of a run, in one file."""
    from afina.errors import ConfigError
    from afina.report.html import write_report

    if output is not None and output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give a file, for example {output / 'report.html'}")
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}")
    console().print(f"{write_report(run, output)}", markup=False)
