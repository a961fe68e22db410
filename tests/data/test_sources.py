"""Rows from one file, from one for each side, from a column that says the side, and from the hub's library."""

from __future__ import annotations

import sys

import pytest
from tables import cut, kind

from afina.data.columns import chosen_columns
from afina.data.divide import divided
from afina.data.options import CleanOptions, DataOptions
from afina.data.repair import repaired
from afina.data.rows import Rows
from afina.data.sources import read_rows
from afina.errors import DataError, MissingDependencyError, Problems

KIND = kind()


def write(path, rows, first=0, columns=("text", "label"), more=()):
    lines = [",".join(columns)]
    for i in range(first, first + rows):
        lines.append(",".join([f"message {i} {'abcdefg'[i % 7] * 9} {i * 7919}", "xyz"[i % 3], *more]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(seed=0, **options):
    options = DataOptions(**options)
    rows = read_rows(options, KIND)
    problems = Problems("rows")
    columns = chosen_columns(rows, KIND, options, problems)
    problems.raise_as(DataError)
    return rows, divided(rows, KIND, options, columns=columns, seed=seed)


def test_one_file_for_each_side(tmp_path):
    train, held = write(tmp_path / "a.csv", 61), write(tmp_path / "b.csv", 13, 100)
    test = write(tmp_path / "c.csv", 17, 200, ("text", "label", "more"), ["m"])
    rows, done = read(file=train, validation_file=held, test_file=test)
    assert rows.columns == ["text", "label"]
    assert {side: len(chosen) for side, chosen in done.sides.items()} == {"train": 61, "validation": 13, "test": 17}
    assert next(done.examples[i].line for i in done.sides["test"]) == "c.csv:2"
    assert done.split == "given"


def test_a_side_without_a_file_is_taken_from_train(tmp_path):
    train, test = write(tmp_path / "a.csv", 61), write(tmp_path / "b.csv", 17, 200)
    _, done = read(file=train, test_file=test)
    assert {side: len(chosen) for side, chosen in done.sides.items()} == {"train": 54, "validation": 7, "test": 17}
    assert "validation rows are taken from train, since none are given" in done.notes
    assert all(str(done.examples[i].line).startswith("b.csv") for i in done.sides["test"])
    assert read(file=train, test_file=test)[1].sides == done.sides
    assert read(file=train, test_file=test, seed=1)[1].sides != done.sides
    _, done = read(file=train, validation_file=test)
    assert {side: len(chosen) for side, chosen in done.sides.items()} == {"train": 48, "validation": 17, "test": 13}


def test_files_that_do_not_go_together(tmp_path):
    train = write(tmp_path / "a.csv", 61)
    other = write(tmp_path / "b.csv", 13, 100, ("text", "lable"))
    with pytest.raises(DataError, match=r"b\.csv lacks the column 'label'"):
        read(file=train, test_file=other, label="label")
    (tmp_path / "sides").mkdir()
    for name in ("train.csv", "test.csv"):
        write(tmp_path / "sides" / name, 13)
    with pytest.raises(DataError, match=r"data\.file: .*sides holds train and test rows itself"):
        read(file=str(tmp_path / "sides"), test_file=train)
    with pytest.raises(DataError, match="there is no file"):
        read(file=train, test_file=str(tmp_path / "none.csv"))


def test_files_of_one_name_are_told_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train, test = write(tmp_path / "one" / "a.csv", 31), write(tmp_path / "two" / "a.csv", 11, 90)
    _, done = read(file=train, test_file=test)
    assert {str(done.examples[i].line).split(":")[0] for i in done.sides["test"]} == {"test/a.csv"}


def test_a_column_says_the_side(tmp_path):
    path = tmp_path / "a.csv"
    sides = ["Train", "dev", "TEST"]
    rows = [f"message {i} {'abcdefg'[i % 7] * 9} {i * 7919},x,{sides[i % 3]}" for i in range(31)]
    path.write_text("text,label,part\n" + "\n".join(rows) + "\nlast,y,train\n")
    _, done = read(file=str(path), split_column="part")
    assert {side: len(chosen) for side, chosen in done.sides.items()} == {"train": 12, "validation": 10, "test": 10}


def test_groups_of_a_column_are_whole(tmp_path):
    path = tmp_path / "a.csv"
    rows = [f"message {i} {'abcdefg'[i % 7] * 9} {i * 7919},{'xyz'[i % 3]},{i // 6 if i < 150 else ''}" for i in range(173)]
    path.write_text("text,label,who\n" + "\n".join(rows) + "\n")
    for seed in range(5):
        table, done = read(file=str(path), group="who", seed=seed)
        sides = {(table.rows[done.rows[i]]["who"], side) for side, chosen in done.sides.items() for i in chosen}
        assert len({who for who, _ in sides if who}) == len([who for who, _ in sides if who]) == 25
        assert len(done.sides["test"]) == pytest.approx(35, abs=6)
        assert done.split == "grouped"


def test_a_hub_data_set_keeps_its_sides(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    for name, rows, first in (("train", 31, 0), ("validation", 5, 100), ("test", 7, 200)):
        write(tmp_path / f"{name}.csv", rows, first)
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows, done = read(file=f"hub:{tmp_path}")
    assert {side: len(chosen) for side, chosen in done.sides.items()} == {"train": 31, "validation": 5, "test": 7}
    assert rows.lines[31] == "validation:1"
    with pytest.raises(DataError, match=r"hub:.*nowhere is no file, and cannot be read from the hub: .*hub:NAME"):
        read(file=f"hub:{tmp_path}/nowhere")


def test_without_the_library_the_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'afina\[data\]'"):
        read(file="hub:someone/something")
    with pytest.raises(MissingDependencyError, match="there is no file someone/something, and reading data sets of the hub"):
        read(file="someone/something")
    with pytest.raises(DataError, match="there is no file"):
        read(file="someone/something.csv")


def test_letters_are_repaired_and_nothing_else():
    steps = CleanOptions()
    same = ["“quotes” &amp; ﬁne …", "\uff26\uff35 width", "a\r\nb\tc", "e\u0301", "😀 ok"]
    assert [repaired(text, steps) for text in same[:3]] == same[:3]
    assert repaired(same[3], steps) == "é"
    assert repaired(" schÃ¶n \x07bell ", steps) == "schön bell"
    assert repaired("schÃ¶n", CleanOptions(unicode=False)) == "schÃ¶n"
    assert repaired(" a \n\n b\u00a0c ", CleanOptions(white_space=True)) == "a b c"


def test_rows_are_what_was_put_in():
    made = [{"a": str(i % 3), "b": f"text {i}" * (i % 40)} for i in range(101)]
    rows = Rows(["a", "b"], made)
    assert rows == made
    assert list(rows) == made
    assert rows[-1] == made[-1]
    assert rows[3:7] == made[3:7]
    assert rows.column("b")[17] == made[17]["b"]
    rows[0]["a"] = "changed"
    assert rows[0]["a"] == "0"
    rows.add_column("c")
    rows.append(["x", "y", "z"])
    assert rows[5]["c"] == ""
    assert rows[101] == {"a": "x", "b": "y", "c": "z"}
    assert rows != made
    with pytest.raises(ValueError, match="argument"):
        rows.append(["x"])


def test_a_prepared_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    from afina.cli.main import main

    path = tmp_path / "a.csv"
    rows = [f"message {i // 2 if i < 20 else i} {'abcdefg'[i % 7] * 9} {i * 7919},{'xyz'[i % 3]}" for i in range(97)]
    path.write_text("text,label\n" + "\n".join(rows + rows[:9]) + "\n")
    for balance in ("oversample", "class_weights"):
        out = tmp_path / balance
        words = ["prepare", "--data", str(path), "--output", str(out), f"data.balance={balance}", "--seed", "3"]
        monkeypatch.setattr(sys, "argv", ["afina", *words])
        with pytest.raises(SystemExit):
            main()
        _, first = read(file=str(path), balance=balance, seed=3)
        _, again = read(file=str(out), seed=5)
        for side, chosen in first.sides.items():
            texts = [again.examples[i].text for i in again.sides[side]]
            assert texts == [first.examples[i].text for i in chosen]
        assert again.weights == first.weights
        assert "rows are taken as `afina prepare` left them" in again.notes


def test_the_cut_helper_reads_the_same(tmp_path):
    path = write(tmp_path / "a.csv", 41)
    rows, done = read(file=path)
    assert cut(rows, columns={"text": "text", "label": "label"}).sides == done.sides
