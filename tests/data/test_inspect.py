"""What is told of the rows: words and columns that give the label away, labels that may be wrong, languages."""

from __future__ import annotations

import random

import pytest
from tables import cut, kind, table

from afina.data.example import Example
from afina.data.giveaways import telling_words
from afina.data.inspect import said
from afina.data.languages import languages
from afina.data.suspects import suspected

WORDS = {"sun": ["warm", "light", "bright", "beach", "sand"], "rain": ["wet", "cloud", "drop", "storm", "grey"]}


def texts(number, seed=0):
    """Texts with two words of their class, one of the other, and words of none."""
    chance = random.Random(seed)
    made = []
    for i in range(number):
        label, other = ("sun", "rain") if i % 2 else ("rain", "sun")
        words = chance.sample(WORDS[label], 3) + chance.sample(WORDS[other], 1)
        words += [f"n{chance.randrange(97)}" for _ in range(5)]
        chance.shuffle(words)
        made.append((" ".join(words), label))
    return made


def test_wrong_labels_are_listed_and_stay():
    rows = texts(401)
    wrong = random.Random(1).sample(range(401), 11)
    rows = [(text, {"sun": "rain", "rain": "sun"}[label] if i in wrong else label) for i, (text, label) in enumerate(rows)]
    found = suspected([Example(text, label, i) for i, (text, label) in enumerate(rows)], seed=0)
    lines = [row["line"] for row in found.rows]
    assert len(set(wrong) & set(lines)) >= 6  # chance would list one
    assert len(lines) == found.count <= 11
    done = cut(table(*rows))
    assert len(done.examples) == 401
    assert done.report()["suspects"]["count"] > 5
    assert any(line.startswith("labels that may be wrong: line") and "all rows stay" in line for line in done.lines())
    assert cut(table(*rows), clean={"suspects": False}).report()["suspects"] is None


def test_suspects_are_not_looked_for_where_that_would_cost_or_tell_too_little(monkeypatch):
    chance = random.Random(2)
    noise = [Example(" ".join(f"w{chance.randrange(999)}" for _ in range(9)), chance.choice("ab"), i) for i in range(200)]
    assert "words alone answer but" in suspected(noise, 0).left_out
    monkeypatch.setattr("afina.data.suspects._MOST_ROWS", 100)
    assert "more than 100 rows" in suspected(noise, 0).left_out
    assert any("labels that may be wrong: not looked for" in line for line in said({"suspects": vars(suspected(noise, 0))}))


def test_a_word_that_tells_the_label_is_found_and_one_that_does_not_is_not():
    rows = [(f"{text} {'sent from my phone' if label == 'sun' else ''}", label) for text, label in texts(201)]
    found = telling_words([Example(text, label, i) for i, (text, label) in enumerate(rows)])
    assert {"sent from", "from my", "my phone"} <= {f["words"] for f in found}
    assert not {"sent", "from", "my"} & {f["words"] for f in found}  # the pairs say it
    assert all(f["label"] == "sun" and f["rows"] == f["of"] == 100 and f["of_class"] == 1.0 for f in found[:3])
    assert telling_words([Example(text, "a", i) for i, (text, _) in enumerate(rows)]) == []
    even = [Example(f"word{i % 7} and", "ab"[i % 2], i) for i in range(200)]
    assert telling_words(even) == []


def test_columns_that_should_not_be_in_the_input():
    chance = random.Random(3)
    rows = [
        (text, label, str(1000 + i), "web", {"sun": "7", "rain": "9"}[label], chance.choice("uvw"))
        for i, (text, label) in enumerate(texts(97))
    ]
    made = table(*rows, columns=["t", "l", "id", "source", "code", "who"])
    found = {c["column"]: c["what"] for c in cut(made).report()["telling_columns"]}
    assert found == {
        "id": "numbers the rows: no two have the same",
        "source": "is 'web' in every row",
        "code": "says the label: its 2 values give it in 100.0% of the rows",
    }
    used = cut(made, columns={"text": "code", "label": "l"}, clean={"duplicates": False, "near_duplicates": "ignore"})
    assert "column 'code' says the label: its 2 values give it in 100.0% of the rows and is used as text" in used.lines()


def test_languages_of_texts():
    pytest.importorskip("py3langid")
    english = ["The weather has been rather fine in the last weeks of summer", "Please send me the report before noon"]
    german = ["Das Wetter war in den letzten Wochen des Sommers schön", "Bitte schicken Sie mir den Bericht vor Mittag"]
    found = languages(english * 40 + german * 20 + ["ok", "12345"])
    assert found is not None
    assert found["en"] == pytest.approx(2 / 3, abs=0.01)
    assert found["de"] == pytest.approx(1 / 3, abs=0.01)
    assert said({"languages": found}) == ["languages: en 67%, de 33%"]
    assert languages(["ok", "12"]) == {}


def test_lengths_and_imbalance():
    rows = texts(101)
    done = cut(table(*[row for i, row in enumerate(rows) if i % 2 or i % 14 == 0])).report()
    assert done["words"]["0 %"] == done["words"]["100 %"] == 9
    assert done["imbalance"] == {"ratio": 6.25, "most": "sun", "least": "rain"}
    assert "classes are uneven: 6.25 rows of 'sun' to one of 'rain'" in "".join(said(done))
    plain = cut(table(*[(t,) for t, _ in rows], columns="t"), of=kind("none")).report()
    assert plain["imbalance"] is None
    assert plain["telling_words"] == []
