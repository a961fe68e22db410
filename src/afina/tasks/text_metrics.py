"""How near written texts come to the ones expected: ROUGE for summaries, BLEU and chrF for translations, exact match.

ROUGE is rouge-score's, with words of any alphabet (its own tokenizer drops every letter outside a to z); BLEU and chrF are
sacrebleu's. A text may have several references: ROUGE and exact match take the best, BLEU and chrF know of all.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import zip_longest

from afina.errors import MissingDependencyError

__all__ = ["check_libraries", "first_sentence", "most_similar", "overlap_figures", "translation_figures"]

EXTRA = "text"
_MODULES = {"rouge_score": "rouge-score", "sacrebleu": "sacrebleu"}


def check_libraries(*modules: str) -> None:
    """Raise MissingDependencyError before a run that would need what is not installed at its end."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(_MODULES[module], EXTRA, "comparing written texts with the expected ones")


def overlap_figures(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (F1, mean over texts, best reference of each), and the share that is equal; 0 to 1."""
    check_libraries("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge1": "rouge1", "rouge2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()), tokenizer=_Words())
    sums = dict.fromkeys([*names, "exact_match"], 0.0)
    for answer, known in zip(answers, references, strict=True):
        scored = [scorer.score(reference, answer) for reference in known]
        for key, name in names.items():
            sums[key] += max(one[name].fmeasure for one in scored)
        sums["exact_match"] += any(_plain(answer) == _plain(reference) for reference in known)
    return {key: value / len(answers) for key, value in sums.items()}


def translation_figures(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU and chrF of the whole, 0 to 100."""
    check_libraries("sacrebleu")
    from sacrebleu.metrics import BLEU, CHRF

    columns = [list(column) for column in zip_longest(*references)]  # None where a text has fewer references
    return {
        "bleu": BLEU().corpus_score(list(answers), columns).score,
        "chrf": CHRF().corpus_score(list(answers), columns).score,
    }


def first_sentence(text: str) -> str:
    """Up to the first full stop, question or exclamation mark that white space follows."""
    return re.split(r"(?<=[.!?])\s+", text.strip(), maxsplit=1)[0]


def most_similar(known: Sequence[str], texts: Sequence[str]) -> list[int]:
    """For each text, the number of the known text that shares most rare words with it (cosine of tf-idf)."""
    counts = [Counter(_Words().tokenize(text)) for text in known]
    frequency = Counter(word for row in counts for word in row)
    rarity = {word: math.log(1 + len(known) / n) for word, n in frequency.items()}
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for i, row in enumerate(counts):
        length = math.sqrt(sum((n * rarity[word]) ** 2 for word, n in row.items()))
        for word, n in row.items():
            found[word].append((i, n * rarity[word] / length))
    nearest = []
    for text in texts:
        scores: dict[int, float] = defaultdict(float)
        for word, n in Counter(_Words().tokenize(text)).items():
            for i, weight in found.get(word, ()):
                scores[i] += n * rarity[word] * weight
        nearest.append(min(scores, key=lambda i: (-scores[i], i), default=0))
    return nearest


class _Words:
    """Words of any alphabet, in small letters; rouge-score asks for an object."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
