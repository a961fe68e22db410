"""Which languages texts are in, by py3langid (97 languages), on a sample."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

__all__ = ["languages"]

_SAMPLE = 1000
_LETTERS = 20  # fewer tell no language
_SURE = math.log(20)  # how much likelier the first language must be than the second
_RARE = 0.02  # of the sample: what is rarer is mostly an error


def languages(texts: Sequence[str]) -> dict[str, float] | None:
    """Share of each language (ISO 639-1) among texts that are long enough to tell; "other" is what is rare or unsure.

    None without py3langid, which comes with `afina[data]`; empty where no text is long enough.
    """
    try:
        import py3langid
    except ImportError:
        return None
    chosen = random.Random(0).sample(range(len(texts)), min(len(texts), 2 * _SAMPLE))
    long = [texts[i] for i in chosen if sum(map(str.isalpha, texts[i])) >= _LETTERS][:_SAMPLE]
    found: Counter[str] = Counter()
    for text in long:
        (first, a), (_, b), *_ = py3langid.rank(text[:1000])
        found[first if a - b > _SURE else "other"] += 1
    shares: dict[str, float] = {}
    for name, count in found.most_common():
        key = name if count >= _RARE * len(long) else "other"
        shares[key] = shares.get(key, 0.0) + count / len(long)
    return {name: round(share, 3) for name, share in shares.items()}
