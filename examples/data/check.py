"""Print the figures quoted in README.md: counts, near-duplicates and the bag-of-words baseline.

Run it with ``python examples/data/check.py``; it needs scikit-learn only.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline

DEFAULT_PATH = Path(__file__).with_name("customer_messages.csv")
LABELS = ("complaint", "other")
JACCARD_LIMIT = 0.5
SEED = 0


def load(path: Path) -> tuple[list[str], list[str]]:
    """Return the messages and their labels, after checking the shape of the file."""
    with path.open(encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        if reader.fieldnames != ["message", "label"]:
            raise ValueError(f"expected the columns message,label but found {reader.fieldnames}")
        rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if not row["message"] or row["label"] not in LABELS:
            raise ValueError(f"record {number - 1} is empty or has an unknown label: {row}")
    return [row["message"] for row in rows], [row["label"] for row in rows]


def words(message: str) -> list[str]:
    """Split a message into lowercased words, without punctuation."""
    return re.findall(r"\w+", message.lower().replace("'", "").replace("\u2019", ""))


def exact_duplicates(messages: list[str]) -> list[str]:
    """Return the normalised messages that occur more than once."""
    seen = Counter(" ".join(words(message)) for message in messages)
    return [text for text, times in seen.items() if times > 1]


def near_duplicates(messages: list[str], limit: float = JACCARD_LIMIT) -> tuple[list[tuple[int, int]], float]:
    """Return the index pairs whose word 3-gram Jaccard similarity exceeds ``limit``, and the highest similarity.

    A message of fewer than three words counts as a single gram.
    """
    grams = []
    for message in messages:
        tokens = words(message)
        grams.append({tuple(tokens[i : i + 3]) for i in range(max(1, len(tokens) - 2))})
    pairs, highest = [], 0.0
    for i, j in combinations(range(len(grams)), 2):
        shared = len(grams[i] & grams[j])
        if shared:
            similarity = shared / len(grams[i] | grams[j])
            highest = max(highest, similarity)
            if similarity > limit:
                pairs.append((i, j))
    return pairs, highest


def baseline(messages: list[str], labels: list[str]) -> list[float]:
    """Return the five test accuracies of TF-IDF (1-2 grams) with logistic regression."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    folds = StratifiedKFold(n_splits=5, shuffle=True, random_state=SEED)
    return [float(score) for score in cross_val_score(model, messages, labels, cv=folds, scoring="accuracy")]


def main() -> int:
    """Print the report; return 1 when the file holds duplicates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", nargs="?", type=Path, default=DEFAULT_PATH)
    messages, labels = load(parser.parse_args().path)

    counts = Counter(labels)
    lengths = sorted(len(message.split()) for message in messages)
    print(f"rows: {len(messages)}")
    for label in LABELS:
        print(f"  {label}: {counts[label]} ({counts[label] / len(messages):.1%})")
    print(f"words per message: shortest {lengths[0]}, median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")

    repeated = exact_duplicates(messages)
    close, highest = near_duplicates(messages)
    print(f"exact duplicates: {len(repeated)}")
    print(f"near-duplicate pairs (word 3-gram Jaccard > {JACCARD_LIMIT}): {len(close)}, highest {highest:.2f}")
    for i, j in close:
        print(f"  {messages[i]!r} ~ {messages[j]!r}")

    scores = baseline(messages, labels)
    print(f"bag-of-words baseline, 5-fold accuracy: {sum(scores) / len(scores):.3f}")
    print("  folds: " + ", ".join(f"{score:.3f}" for score in scores))
    return 1 if repeated or close else 0


if __name__ == "__main__":
    sys.exit(main())
