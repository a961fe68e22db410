"""Reading one text and writing another, with an encoder and a decoder: summaries, translations (T5, BART and their kin).

The decoder reads the target one place later, behind the model's start token; both are made here, so that no model's own
habits with labels, nor its own normalisation of the loss (T25), come in. Padding counts nowhere, whatever its token is
(T20). A target that is too long loses its end, and then no end token is taught there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from afina.core.config import option
from afina.data.example import Column, Example, Kind
from afina.errors import ConfigError, DataError
from afina.tasks.batches import pad_right
from afina.tasks.decoding import DecoderTask
from afina.tasks.loading import load_base
from afina.tasks.task import NO_LIMIT, Batch, Encoded, Feature, Figure, Rows
from afina.tasks.text_metrics import check_libraries, first_sentence, most_similar, overlap_figures, translation_figures
from afina.tasks.writing import Written

__all__ = ["Seq2Seq"]


def make(row: Mapping[str, str], line: int | str) -> Example:
    """The source, and what is to be written."""
    return Example(row["text"], row.get("label", ""), line)


@dataclasses.dataclass
class Options:
    """What a recipe may say of it."""

    source_prefix: str = option("", "put in front of every source, for example 'summarize: ' for T5")
    max_target_length: int | None = option(None, "tokens of a target; None: the longest, up to what the model takes", low=2)
    generate: bool = option(True, "write the texts of test rows and compare them with those expected")
    generate_rows: int = option(1000, "test rows whose texts are written at most, the first of them", low=1)
    max_new_tokens: int = option(128, "tokens of a written text at most, as far as the model's positions go", low=1)
    num_beams: int = option(1, "texts that are followed at once; 1 takes the likeliest token each time", low=1)


class Seq2Seq(DecoderTask):
    """Reading one text and writing another: summaries, translations."""

    name = "seq2seq"
    task_type = "SEQ_2_SEQ_LM"
    kind = Kind(
        columns={
            "text": Column("the text to read", ("document", "source", "article", "text", "input", "dialogue")),
            "label": Column("the text to write", ("summary", "target", "translation", "highlights", "output", "label")),
        },
        labels="text",
        make=make,
    )
    figures = {
        "loss": Figure("loss per token", better=-1),
        "perplexity": Figure("perplexity", ".2f", better=-1),
        "token_accuracy": Figure("tokens foretold", ".1%"),
        "rouge1": Figure("ROUGE-1", final=True),
        "rouge2": Figure("ROUGE-2", final=True),
        "rouge_l": Figure("ROUGE-L", final=True),
        "bleu": Figure("BLEU", ".1f", final=True),
        "chrf": Figure("chrF", ".1f", final=True),
    }
    Options = Options

    def __init__(self, tokenizer: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(tokenizer, options, learned)
        if self.options.generate:
            check_libraries("rouge_score", "sacrebleu")

    # --- model

    def load_model(self, path: str) -> Any:
        """The base, of which nothing may be missing."""
        from transformers import AutoModelForSeq2SeqLM

        model = load_base(self, AutoModelForSeq2SeqLM, path, heads=())
        start = getattr(model.config, "decoder_start_token_id", None)
        start = model.generation_config.decoder_start_token_id if start is None else start
        if start is None:
            raise ConfigError(f"model {path}: its configuration names no decoder_start_token_id to begin targets with")
        self.learned |= {"start": int(start), "target_limit": self.limit(model)}
        return model

    def limit(self, model: Any) -> int:
        """Positions of the model; T5 has no end of them, whatever its tokenizer says."""
        return int(getattr(model.config, "max_position_embeddings", None) or NO_LIMIT)

    def ends(self, model: Any) -> list[int]:
        """The tokenizer's end token, and those the checkpoint itself stops at."""
        own = model.generation_config.eos_token_id
        return sorted({self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Sources of at most `max_length` tokens, targets of at most `max_target_length`, each counted that was cut.

        Without `max_length`: of the longest source, up to what model and tokenizer are made for.
        """
        plain: dict[str, Any] = {"padding": False, "verbose": False}
        sources = self.tokenizer([self.options.source_prefix + e.text for e in examples], **plain)["input_ids"]
        targets = self.tokenizer(text_target=[e.label for e in examples], **plain)["input_ids"]
        targets = [self._ended(list(ids)) for ids in targets]
        usual = min(limit, self.tokenizer.model_max_length or NO_LIMIT)
        length = min(usual, max(map(len, sources))) if max_length is None else max_length
        longest = self.learned.get("target_limit", NO_LIMIT)
        longest = longest if self.options.max_target_length is None else min(longest, self.options.max_target_length)
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        features, cut_sources, cut_targets, cut = list[Feature](), 0, 0, 0
        for number, (example, source, target) in enumerate(zip(examples, sources, targets, strict=True)):
            feature: Feature = {"input_ids": self._shortened(list(source), length), "row": number}
            long = len(source) > length, bool(example.label) and len(target) > longest
            cut_sources, cut_targets, cut = cut_sources + long[0], cut_targets + long[1], cut + any(long)
            if example.label:
                if not set(target) - special:
                    raise DataError(f"line {example.line}: the target {example.label[:40]!r} has no token to be learned")
                feature["labels"] = target[:longest]
                feature["decoder_ids"] = [self.learned["start"], *target[:longest][:-1]]
            features.append(feature)
        notes = [f"{cut_sources} sources are cut at their end to {length} tokens"] if cut_sources else []
        if cut_targets:
            notes.append(f"{cut_targets} targets are cut at their end to {longest} tokens; no end is learned there")
        return Encoded(features, cut, length, notes)

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == [self.tokenizer.eos_token_id] else [*ids, self.tokenizer.eos_token_id]

    def _shortened(self, ids: list[int], length: int) -> list[int]:
        """The source's end is cut off, its end token kept."""
        if len(ids) <= length:
            return ids
        last = ids[-1:] if ids[-1] == self.tokenizer.eos_token_id else []
        return ids[: length - len(last)] + last

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Ids and mask of the sources, what the decoder reads, and labels; see `decoded`."""
        return {**pad_right(features, self.tokenizer.pad_token_id), **self.decoded(features)}

    # --- targets and questions

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        """Ids and mask of the sources, and what the decoder reads."""
        return {key: batch[key] for key in ("input_ids", "attention_mask", "decoder_input_ids")}

    def questions(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """The sources of the rows that are asked for a text."""
        rows = batch["asked"].nonzero(as_tuple=True)[0]
        return batch["input_ids"][rows], batch["attention_mask"][rows], rows.tolist()

    def room(self, model: Any, width: int) -> int:
        """Positions of the decoder, one of which the start token takes."""
        return self.limit(model) - 1

    # --- figures

    def text_figures(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """ROUGE of summaries, BLEU and chrF of translations."""
        return {**overlap_figures(answers, references), **translation_figures(answers, references)}

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """Token frequencies; where texts are written, also the source itself, its first sentence, and the target of the most
        similar training row."""
        found = super().baselines(train, test)
        if not self.options.generate:
            return found
        examples = test.examples[: self.options.generate_rows]
        nearest = most_similar([e.text for e in train.examples], [e.text for e in examples])
        said = {
            "first_sentence": ("the first sentence", [first_sentence(e.text) for e in examples]),
            "source": ("the source as it is", [e.text for e in examples]),
            "most_similar": ("of the most similar training row", [train.examples[i].label for i in nearest]),
        }
        for name, (title, texts) in said.items():
            figures = self.metrics([Written(text=text) for text in texts], examples)
            unknown = ("loss", "perplexity", "token_accuracy", "tokens")
            found[name] = {"title": title, **{key: value for key, value in figures.items() if key not in unknown}}
        return found

    def rendered(self, feature: Feature) -> tuple[list[str], list[bool]]:
        """The source's tokens, then the target's."""
        source, target = feature["input_ids"], feature.get("labels", [])
        return self.tokenizer.convert_ids_to_tokens([*source, *target]), [False] * len(source) + [True] * len(target)
