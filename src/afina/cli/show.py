"""How the command line prints: tables and colour on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

__all__ = ["console", "fail", "heading", "pairs", "quiet", "table"]


def console(*, stderr: bool = False) -> Any:
    """Where to print: as wide as the terminal, and no line is broken elsewhere."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """Print an error in red, with the process that it is of where it is not the first, and leave."""
    from rich.text import Text

    process = os.environ.get("RANK", "0")
    of = "" if process == "0" else f" in process {process} of {os.environ.get('WORLD_SIZE', '?')}"
    console(stderr=True).print(Text(f"Error{of}: {message}", style="red"))
    sys.exit(code)


def heading(text: str) -> None:
    """A line above a group of lines."""
    from rich.text import Text

    console().print(Text(f"\n{text}", style="bold"))


def pairs(values: Mapping[str, Any], indent: int = 2) -> None:
    """Names and values in two columns."""
    width = max(len(name) for name in values)
    for name, value in values.items():
        lines = str(value).splitlines() or [""]
        console().print(f"{'':{indent}}{name:<{width}}  {lines[0]}", markup=False)
        for line in lines[1:]:
            console().print(f"{'':{indent + width + 2}}{line}", markup=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """A table on a terminal; elsewhere plain lines with the columns below each other."""
    out = console()
    columns, right = [_line(name) for name in columns], [_line(name) for name in right]
    if not out.is_terminal:
        cells = [columns, *([_line(cell) for cell in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            fields = zip(line, widths, columns, strict=True)
            print(f"  {'  '.join(c.rjust(w) if name in right else c.ljust(w) for c, w, name in fields)}".rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 0, 0, 2), header_style="bold", pad_edge=True)
    for i, name in enumerate(columns):
        side: Any = "right" if name in right else "left"
        made.add_column(name, justify=side, overflow="fold", no_wrap=i == 0)
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    out.print(made, soft_wrap=False)


def _line(cell: Any) -> str:
    """A label or a text may have several."""
    return " ".join(str(cell).splitlines())


def quiet() -> None:
    """Keep other libraries from talking over the command: their news is checked and told by afina."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # its import undoes a level that was set before
    for name in ("transformers", "accelerate", "huggingface_hub", "diffusers", "peft", "bitsandbytes", "torchao",
                 "torch.utils._pytree", "DeepSpeed"):  # fmt: skip
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|huggingface_hub|accelerate|diffusers|peft|torchao|torch)(\.|$)")
