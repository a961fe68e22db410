"""How answers are compared: SQuAD's rule, and that of other languages."""

from __future__ import annotations

import pytest

from afina.tasks.spans import best_overlap, exact_match, f1, normalised_answer


@pytest.mark.parametrize(
    ("text", "language", "plain"),
    [
        ("The  Eiffel-Tower!", "en", "eiffeltower"),
        ("an apple a day", "en", "apple day"),
        ("another theory", "en", "another theory"),  # articles are whole words
        ("«La Plata»", "en", "«la plata»"),  # SQuAD knows the punctuation of ASCII alone
        ("«La Plata»", "es", "plata"),
        ("¿Los 3,5 €?", "es", "35 €"),
        ("Die Übung", "de", "übung"),
        ("the «end»", "none", "the end"),
        ("…", "none", ""),
    ],
)
def test_what_does_not_count(text, language, plain):
    assert normalised_answer(text, language) == plain


@pytest.mark.parametrize(
    ("answer", "truths", "exact", "shared"),
    [
        ("the Eiffel Tower", ["Eiffel tower."], 1.0, 1.0),
        ("Eiffel Tower in Paris", ["Eiffel Tower"], 0.0, 2 / 3),
        ("tower", ["Eiffel Tower", "the tower"], 1.0, 1.0),  # the best over the truths
        ("Paris", ["Eiffel Tower"], 0.0, 0.0),
        ("a a b", ["a b b"], 0.0, 2 / 3),  # articles go, then words count as often as they are there
        ("b b c", ["b c c"], 0.0, 2 / 3),
        ("", [], 1.0, 1.0),  # SQuAD 2: no answer, and none given
        ("x", [], 0.0, 0.0),
        ("", ["x"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),  # nothing is left of either
    ],
)
def test_scores_by_hand(answer, truths, exact, shared):
    assert exact_match(answer, truths) == exact
    assert f1(answer, truths) == pytest.approx(shared)


def test_the_guess_is_in_the_context_and_near_the_question():
    context = "El cielo es azul. La torre fue construida por Gustave Eiffel en París. El mar es verde."
    start, end = best_overlap("¿Por quién fue construida la torre?", context)
    assert context[start:end] == "Gustave Eiffel en París"
    assert best_overlap("?", "🎉") == (0, 0)
    assert best_overlap("a", "a") == (0, 1)
