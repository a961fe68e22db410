"""The house rules that a program can check: explicit public names, and imports that only go down."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import afina

SOURCE = Path(afina.__file__).parent
DOCUMENT = Path(__file__).parents[2] / "docs" / "architecture.md"
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(SOURCE)], "afina."))


@pytest.mark.parametrize("name", ["afina", *MODULES])
def test_public_names_are_listed_sorted_and_there(name: str) -> None:
    if name == "afina.core.lora_kernel":
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", None)
    if listed is None:
        assert Path(module.__file__ or "").name == "__init__.py", f"{name} has no __all__"
        return
    assert list(listed) == sorted(listed, key=lambda n: (0 if n.isupper() else 1 if n[0].isupper() else 2, n))
    assert all(getattr(module, public) is not None for public in listed)
    assert module.__doc__


def order() -> list[list[str]]:
    """Files and folders from the ground up, row by row, as the table of the document has them."""
    rows = re.findall(r"^\| (`[^|]*) \|", DOCUMENT.read_text(encoding="utf-8"), flags=re.M)
    last = next(i for i, row in enumerate(rows) if "cli/" in row)
    return [re.findall(r"`([^`]*)`", row) for row in rows[: last + 1]]


def place(path: str, places: list[list[str]]) -> int:
    """Row of a file; a folder's row is that of all its files."""
    for i, row in enumerate(places):
        if any(path == entry or (entry.endswith("/") and path.startswith(entry)) for entry in row):
            return i
    raise AssertionError(f"{path} is in no row of the table in {DOCUMENT.name}")


def test_imports_only_go_down() -> None:
    places, wrong = order(), []
    for file in sorted(SOURCE.rglob("*.py")):
        path = file.relative_to(SOURCE).as_posix()
        if path == "__init__.py" or path.endswith("/__init__.py"):
            continue
        here = place(path, places)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in tree.body:  # imports within functions are made when they are needed
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("afina."):
                base = str(node.module).removeprefix("afina.").replace(".", "/")
                inside = [f"{base}/{alias.name}.py" for alias in node.names]
                targets = [f"{base}.py"] if (SOURCE / f"{base}.py").is_file() else inside
                wrong += [f"{path} imports {t}" for t in targets if (SOURCE / t).is_file() and place(t, places) > here]
    assert not wrong


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, afina; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'numpy'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
