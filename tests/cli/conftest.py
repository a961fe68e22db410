from __future__ import annotations

import contextlib
import io
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


def typed(words):
    """Run the command line in this process; gives its exit code."""
    from afina.cli.main import main

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["afina", *map(str, words)])
        try:
            main()
        except SystemExit as left:
            return left.code or 0
    return 0


@pytest.fixture(scope="session")
def finished():
    """A command that has to succeed; gives what it printed. For fixtures that outlive a test."""

    def run(*words):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = typed(words)
        assert code == 0, err.getvalue()
        return out.getvalue()

    return run


@pytest.fixture
def afina(capsys):
    """Run the command line in this process."""

    def run(*words):
        capsys.readouterr()
        code = typed(words)
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return Said(code, said.out, said.err)

    return run
