"""Rows of a stated length for a plan without data, and a tokenizer of one word for a plan without a tokenizer."""

from __future__ import annotations

import json
from typing import Any

from afina.data.example import Example

__all__ = ["one_word_tokenizer", "rows_of_words"]

_WORD = "the"  # one token for nearly every tokenizer; a longer row is cut
_SPECIAL = ("<unk>", "<pad>", "<s>", "</s>", "[CLS]", "[SEP]", "[MASK]")


def one_word_tokenizer(config: Any) -> Any:
    """A tokenizer that makes one token of every word; it ends a sequence as the model's own would, with one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate((*_SPECIAL, _WORD))}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", _SPECIAL.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", cls_token="[CLS]", sep_token="[SEP]"
    )


def rows_of_words(task: type[Any], options: Any, length: int) -> list[Example]:
    """Two examples of a task, each at least `length` tokens long; targets of a text-to-text task as long as they may be."""
    long = " ".join([_WORD] * length)
    columns = task.kind.columns
    rows = []
    for label in ("first", "second"):
        row = {"text": long, "label": label}
        if task.name in ("reward", "dpo", "orpo", "kto"):
            row = {"text": _WORD, "text_pair": long, "label": f"{long} {label}" if task.name != "kto" else "true"}
        elif task.name == "reranking":
            row |= {"text": _WORD, "text_pair": long, "label": "1" if label == "first" else "0"}
        elif "text_pair" in columns and columns["text_pair"].required:
            row |= {"text": _WORD, "text_pair": long, "label": json.dumps({"text": [_WORD], "answer_start": [0]})}
        elif task.name == "sentence_similarity":
            row |= {"text_pair": long, "label": ""}
        elif task.name == "token_classification":
            row["label"] = " ".join(["first", "second"] * length).rsplit(" ", length)[0]
        elif task.kind.labels == "number":
            row["label"] = "0" if label == "first" else "1"
        elif task.kind.labels == "text":
            row["label"] = " ".join([_WORD] * (getattr(options, "max_target_length", None) or length))
        rows.append(row)
    return [task.kind.make(row, i) for i, row in enumerate(rows, 1)]
