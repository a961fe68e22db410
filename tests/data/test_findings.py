"""The section of the report that tells what was found in the rows."""

from __future__ import annotations

from types import SimpleNamespace

from tables import cut, table
from test_inspect import texts

from afina.report.findings import findings


def told(done, **more):
    data = {"file": "rows.csv", "columns": {"text": "t", "label": "l"}, **done.report(), **more}
    run = SimpleNamespace(data=data, recipe={"data": {"file": "rows.csv"}}, labels=sorted(done.cleaned.classes), what="text")
    return findings(run)


def test_everything_that_was_found_is_told():
    rows = [(f"{text} {'<b>sent</b> from my phone' if label == 'sun' else ''}", label, "web") for text, label in texts(301)]
    rows[7] = (rows[7][0], "rain", "web")
    rows += [rows[3], (rows[5][0] + ".", rows[5][1], "web"), ("schÃ¶n gedacht", "sun", "web"), ("", "sun", "web")]
    done = cut(table(*rows, columns="tls"), balance="oversample")
    html = told(done, tokens={"0 %": 3, "100 %": 1234})
    for said in (
        "1 row repaired: letters were read in a wrong encoding",
        "1 row dropped: the text is empty (line 306)",
        "1 row dropped: the same text with the same label",
        "2 rows in 1 group say nearly the same",
        "column “s” is &#x27;web&#x27; in every row",
        "Words that alone give the label away",
        "my phone",
        "Labels that may be wrong, by words alone (all of them; no row was dropped)",
        "1,234 at 100 %",
        "by chance, with the share of each class on every side",
    ):
        assert said in html, said
    assert "<b>" not in html
    if done.repeated:
        assert "repeated, so that classes are of one size" in html


def test_weights_and_what_was_not_looked_for():
    done = cut(table(*texts(101)), balance="class_weights")
    done.inspected["suspects"] = {"count": 0, "rows": [], "left_out": "not looked for among more than 20,000 rows"}
    html = told(done)
    assert "Labels that may be wrong: not looked for among more than 20,000 rows." in html
    assert "“rain” 1" in html
