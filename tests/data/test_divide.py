"""T27: nothing exact or near on two sides, whoever made them; the same seed gives the same rows."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from tables import cut

from afina.data.clean import normalised
from afina.data.read import read_table
from afina.data.similar import near_duplicates

SMS = Path(__file__).parents[3] / "shared" / "data" / "sms_spam"
SMS_COLUMNS = {"text": "2", "label": "1"}


def pieces(text):
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def test_near_duplicates_are_those_of_all_pairs():
    chance = random.Random(3)
    texts = ["".join(chance.choices("ab c", k=chance.randrange(1, 29))) for _ in range(53)]
    texts += [text[: chance.randrange(len(text) + 1)] + text[1:] for text in texts] + [text + "." for text in texts]
    found = {i: n for n, group in enumerate(near_duplicates(texts)) for i in group}
    sets = [pieces(text) for text in texts]
    for i, a in enumerate(sets):
        for j, b in enumerate(sets[:i]):
            if len(a & b) >= 0.8 * len(a | b):
                assert found.get(i, -1) == found.get(j, -2), (texts[i], texts[j])
    for i, n in found.items():
        assert any(m == n and j != i and len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j]) for j, m in found.items())


@pytest.mark.skipif(not SMS.is_dir(), reason="../shared/data/sms_spam is absent")
def test_t27_real_messages_have_duplicates_and_no_leak(tmp_path):
    table = read_table(SMS / "SMSSpamCollection", {"1", "2"})
    done = cut(table, columns=SMS_COLUMNS, seed=1)
    assert len(done.cleaned.duplicates) > 400
    assert cut(table, columns=SMS_COLUMNS, seed=1).sides == done.sides
    side_of = {i: side for side, rows in done.sides.items() for i in rows}
    assert sorted(side_of) == list(range(len(done.examples)))
    for group in near_duplicates([normalised(e.text) for e in done.examples]):
        assert len({side_of[i] for i in group}) == 1
    assert len(done.sides["test"]) == pytest.approx(0.2 * len(done.examples), abs=2)


def test_t27_of_copies_on_given_sides_the_test_row_stays(tmp_path):
    for name in ("train", "validation", "test"):
        rows = [f"{name} says the number {i},{'ab'[i % 2]}" for i in range(7)]
        rows += ["THE very same text,a", f"nearly the same rather long text of a message{name[1]},b"]
        (tmp_path / f"{name}.csv").write_text("\n".join(["t,l", *rows]))
    done = cut(read_table(tmp_path))
    texts = {name: [normalised(done.examples[i].text) for i in rows] for name, rows in done.sides.items()}
    assert "the very same text" in texts["test"]
    assert not {"the very same text"} & {*texts["train"], *texts["validation"]}
    assert any(text.startswith("nearly") for text in texts["test"])
    assert not any(text.startswith("nearly") for text in texts["train"] + texts["validation"])
    assert "train.csv:10" in done.leaks


def test_prepare_writes_what_it_says_and_reads_it_back_unchanged(tmp_path, capsys, monkeypatch):
    from afina.cli.main import main

    file, output = tmp_path / "rows.csv", tmp_path / "out"
    file.write_text("id,message,label\n" + "".join(f"{i},text number {i * i * 37},{'ab'[i % 2]}\n" for i in range(31)))
    words = ["afina", "prepare", "--data", str(file), "--label", "label", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--text", "mesage"])
    with pytest.raises(SystemExit):
        main()
    assert "Did you mean 'message'" in capsys.readouterr().err
    assert not output.exists()
    monkeypatch.setattr(sys, "argv", [*words, "--text", "message"])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    report = json.loads((output / "data_report.json").read_text())
    sides = {side: (output / f"{side}.jsonl").read_text().splitlines() for side in ("train", "validation", "test")}
    assert {side: len(lines) for side, lines in sides.items()} == {n: s["rows"] for n, s in report["splits"].items()}
    table = read_table(output)
    assert (table.text, table.label, table.columns) == ("message", "label", ["id", "message", "label"])
    again = cut(table, columns={"text": "message", "label": "label"}, seed=5)
    for side, lines in sides.items():
        written = [(row["message"], row["label"]) for row in map(json.loads, lines)]
        assert [(again.examples[i].text, again.examples[i].label) for i in again.sides[side]] == written


def test_training_from_the_prepared_folder_is_training_from_the_file(tmp_path, monkeypatch):
    from tiny_bases import save_bert, write_rows

    from afina.cli.main import main
    from afina.training.recipe import DataOptions, Recipe, TrainingOptions
    from afina.training.run import prepare

    base, file = save_bert(tmp_path / "base"), write_rows(tmp_path / "rows.csv", 53)
    words = ["--data", str(file), "--text", "message", "--label", "label", "--output", str(tmp_path / "prepared")]
    monkeypatch.setattr(sys, "argv", ["afina", "prepare", *words])
    with pytest.raises(SystemExit):
        main()
    metrics = []
    for data in (DataOptions(str(file), "message", "label"), DataOptions(str(tmp_path / "prepared"))):
        options = TrainingOptions(epochs=1, precision="fp32")
        run = prepare(Recipe(model=str(base), data=data, training=options), tmp_path / f"run{len(metrics)}")
        metrics.append(run.execute())
    assert metrics[0]["test"] == metrics[1]["test"]
    assert metrics[0]["validation"] == metrics[1]["validation"]
