from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

import pytest
from tiny_bases import save_bert, write_rows


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """A folder with a tiny base and a file of rows."""
    folder = tmp_path_factory.mktemp("cli")
    save_bert(folder / "base")
    write_rows(folder / "rows.csv", 97)
    return folder


@pytest.fixture
def afina(capsys, monkeypatch):
    """Run the command line in this process."""

    def run(*words):
        from afina.cli.main import main

        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["afina", *map(str, words)])
        with warnings.catch_warnings():
            try:
                main()
                code = 0
            except SystemExit as left:
                code = left.code or 0
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return Said(code, said.out, said.err)

    return run
