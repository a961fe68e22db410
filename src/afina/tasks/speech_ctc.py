"""Writing down speech letter by letter: wav2vec 2.0, XLS-R, HuBERT, WavLM and their kin.

The model says a letter, or nothing, for every stretch of 20 milliseconds or so; every way of spreading the transcript over
these places counts (connectionist temporal classification, Graves et al. 2006,
https://www.cs.toronto.edu/~graves/icml_2006.pdf). What is read is the likeliest letter of each place, repetitions and
nothings taken out. "Nothing" is the padding token.

A base that was trained on sound alone has no letters yet: they are taken from the transcripts, and the layer that says
them is made anew and trained whole. A base that has letters keeps them, and a transcript with others is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F

from afina.data.example import Example
from afina.errors import ConfigError, DataError, shortened
from afina.tasks.batches import has_values, padded
from afina.tasks.loading import load_base, renew_heads
from afina.tasks.sounds import SHORTEST, SoundTask, steady
from afina.tasks.speech_recognition import SpeechOptions, SpeechRecognition, refuse
from afina.tasks.task import IGNORED, Batch, Encoded, Feature, Figure
from afina.tasks.transcripts import error_rates, spelled

__all__ = ["Heard", "SpeechCtc"]

_WRITING = ("language", "speech_task", "generate", "generate_rows", "max_new_tokens", "num_beams")  # options of decoders
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@dataclass
class Heard:
    """The answer to one recording: its text, and the loss and the number of the letters expected, where they are known."""

    text: str
    loss: float = 0.0
    tokens: int = 0


class SpeechCtc(SpeechRecognition):
    """Writing down what is said, letter by letter."""

    auto = "AutoModelForCTC"
    figures = {
        "loss": Figure("loss per letter", better=-1),
        "wer": Figure("word error rate", ".1%", better=-1),
        "cer": Figure("character error rate", ".1%", better=-1),
        "wer_as_written": Figure("word error rate with case and punctuation", ".1%", better=-1),
    }

    def __init__(self, processor: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        learned, options = dict(learned or {}), options or self.Options()
        usual = SpeechOptions()
        idle = [f.name for f in fields(usual) if f.name in _WRITING and getattr(options, f.name) != getattr(usual, f.name)]
        if idle:
            raise ConfigError(
                f"{', '.join(f'task.{name}' for name in idle)}: of models with a decoder; this one says a letter for every "
                "stretch of sound, and needs no such option. Leave it out"
            )
        characters = learned.pop("characters", [])
        if not hasattr(processor, "tokenizer"):
            letters = {letter for c in characters for letter in spelled(c, options.case, options.punctuation)}
            learned["vocabulary"] = _vocabulary(letters)
            processor = _with_letters(processor, learned["vocabulary"])
        super().__init__(processor, options, learned)

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """The characters of all transcripts."""
        return {"characters": sorted({c for e in (*train, *others) for c in e.label if not c.isspace()})}

    # --- model

    def load_model(self, path: str) -> Any:
        """The base; with a new layer of letters where it has none of its own."""
        from transformers import AutoConfig, AutoModelForCTC

        new, settings = "vocabulary" in self.learned, steady(path)
        if new:
            settings |= {"vocab_size": len(self.learned["vocabulary"]), "pad_token_id": self.tokenizer.pad_token_id}
        own = AutoConfig.from_pretrained(path).vocab_size
        model = load_base(self, AutoModelForCTC, path, heads=("lm_head.",) if new else (), **settings)
        if new and own == settings["vocab_size"] and not self.storage.empty:
            renew_heads(model, own)
        self.untuned = not new  # type: ignore[misc]  # what random letters say is nothing to compare with
        self.learned |= {"windows": _windows(model.config), "letters": int(model.config.vocab_size)}
        self.settle_padding(model)
        return model

    def places(self, samples: int) -> int:
        """How many letters the model says of so many samples."""
        samples = max(samples, int(SHORTEST * self.rate))
        for width, step in self.learned["windows"]:
            samples = (samples - width) // step + 1
        return max(samples, 0)

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Paths and lengths, and the letters expected, where examples have them. Raises DataError naming the rows whose
        letters the model does not know, or has no place for."""
        made = super().encode(examples, max_length, limit)
        found = self.spoken(examples)
        self._check_letters(examples, found)
        crowded = []
        for feature, example, ids in zip(made.features, examples, found, strict=True):
            if not example.label:
                continue
            feature["labels"] = ids
            needed = len(ids) + sum(one == other for one, other in pairwise(ids))  # nothing stands between equal letters
            if needed > (there := self.places(feature["length"])):
                seconds = feature["length"] / self.rate
                crowded.append(f"line {example.line}: {needed} letters in {seconds:.2f} seconds, of which the model hears "
                               f"{there} places: {example.label[:40]!r}")  # fmt: skip
        refuse("recordings", crowded, "Is the transcript that of another recording? Correct these rows, or take them out.")
        return made

    def _check_letters(self, examples: Sequence[Example], found: Sequence[Sequence[int]]) -> None:
        """Raise DataError with the characters that the vocabulary lacks."""
        unknown, head = self.tokenizer.unk_token_id, self.learned["letters"]
        lost = [e for e, ids in zip(examples, found, strict=True)
                if e.value and (unknown in ids or max(ids, default=0) >= head)]  # fmt: skip
        if not lost:
            return
        own = (self.options.case, self.options.punctuation)
        cases, points = dict.fromkeys((own[0], "upper", "lower")), dict.fromkeys((own[1], False))
        ways = [(case, point) for point in points for case in cases]
        lacking = {way: self._lacking(lost, *way) for way in ways}
        best = min(ways, key=lambda way: len(lacking[way]))
        said = [f"task.{key}={str(to).lower()}" for key, old, to in zip(("case", "punctuation"), own, best, strict=True)
                if to != old]  # fmt: skip
        cure = f"Say {' '.join(said)}" if said else "Write them otherwise"
        rest = f", which leaves {shortened(lacking[best])}" if said and lacking[best] else ""
        raise DataError(
            f"the model's vocabulary lacks characters of {len(lost)} of {len(examples)} transcripts (one in line "
            f"{lost[0].line}): {shortened(lacking[own])}. {cure}{rest}, or take these rows out"
        )

    def _lacking(self, examples: Sequence[Example], case: str, punctuation: bool) -> list[str]:
        letters = sorted({c for e in examples for c in spelled(e.label, case, punctuation) if not c.isspace()})
        plain: dict[str, Any] = {"add_special_tokens": False}
        return [c for c in letters if self.tokenizer.unk_token_id in self.tokenizer(c, **plain)["input_ids"]]

    def collate(self, features: Sequence[Feature]) -> Batch:
        """What the model reads; how many letters it says of each row, "places" `[rows]`; and labels `[rows, letters]`."""
        batch = super().collate(features)
        batch["places"] = torch.tensor([self.places(f["length"]) for f in features])
        if all("labels" in f for f in features):
            batch["labels"] = padded([f["labels"] for f in features], IGNORED)
        return batch

    # --- training and answers

    def losses(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Negative log likelihood of each row `[rows]`, of logits `[rows, places, letters]`."""
        scores = logits.log_softmax(-1)
        if not has_values(logits):  # a plan: as much is kept for backward
            return scores.sum((1, 2))
        labels, places = batch["labels"], batch["places"]
        return F.ctc_loss(
            scores.transpose(0, 1), labels.clamp(min=0), places, (labels != IGNORED).sum(1),
            blank=self.tokenizer.pad_token_id, reduction="none",
        )  # fmt: skip

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Negative log likelihood of the transcripts, summed."""
        return self.losses(self.logits(model, batch), batch).sum()

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Its letters."""
        return float((batch["labels"] != IGNORED).sum())

    @torch.no_grad()
    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """The text of each row, and its loss where it has labels."""
        logits = self.logits(model, batch)
        if not has_values(logits):
            return [Heard("") for _ in range(len(logits))]
        likeliest = logits.argmax(-1).tolist()
        made = [Heard(self._read(ids[:n])) for ids, n in zip(likeliest, batch["places"].tolist(), strict=True)]
        if "labels" in batch:
            counts = (batch["labels"] != IGNORED).sum(1).tolist()
            for one, loss, count in zip(made, self.losses(logits, batch).tolist(), counts, strict=True):
                one.loss, one.tokens = loss, count
        return made

    def _read(self, ids: Sequence[int]) -> str:
        """Repetitions and nothings taken out."""
        kept = [i for i, _ in groupby(ids) if i != self.tokenizer.pad_token_id]
        own = {"group_tokens": False} if hasattr(self.tokenizer, "word_delimiter_token") else {}
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, **own)).strip()

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """The probability of each letter at each place of a row."""
        scores = torch.softmax(self.logits(model, batch).double(), dim=-1)
        there = torch.arange(scores.shape[1], device=scores.device) < batch["places"][:, None]
        return scores[there]

    # --- figures

    def known(self, answer: Any) -> tuple[float, int]:
        """Summed loss and number of the letters of an answer."""
        return answer.loss, answer.tokens

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """Loss per letter (natural logarithm) and error rates."""
        tokens = sum(a.tokens for a in answers)
        there = [(a.text, self.reference(e)) for a, e in zip(answers, examples, strict=True) if e.label]
        return {
            "rows": len(examples), "tokens": tokens, "loss": sum(a.loss for a in answers) / max(tokens, 1),
            **error_rates([text for text, _ in there], [right for _, right in there]),
        }  # fmt: skip

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """The text."""
        return {"answer": answer.text}

    def rendered(self, feature: Feature) -> tuple[list[str], list[bool]]:
        """Its length, and the letters expected."""
        said, _ = SoundTask.rendered(self, feature)
        letters = self.tokenizer.convert_ids_to_tokens(feature.get("labels", []))
        return [*said, *letters], [False] * len(said) + [True] * len(letters)


def _windows(config: Any) -> list[list[int]]:
    """Width and step of every convolution that samples go through."""
    if not hasattr(config, "conv_kernel"):
        raise ConfigError(
            f"speech_recognition: how many letters a model of the architecture {config.model_type} says of a recording is "
            "not known here; take one of wav2vec 2.0's kin, or one with a decoder, such as openai/whisper-small"
        )
    found = [[int(width), int(step)] for width, step in zip(config.conv_kernel, config.conv_stride, strict=True)]
    if getattr(config, "add_adapter", False):
        found += [[1, int(config.adapter_stride)]] * int(config.num_adapter_layers)
    return found


def _vocabulary(letters: set[str]) -> list[str]:
    """Special tokens, what stands between words, and the letters."""
    return [*_SPECIAL, _between(letters), *sorted(letters)]


def _between(letters: set[str]) -> str:
    return next(mark for mark in ("|", "\N{LOWER ONE EIGHTH BLOCK}", "<space>") if mark not in letters)


def _with_letters(extractor: Any, vocabulary: Sequence[str]) -> Any:
    """A processor whose tokenizer knows these letters."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2Processor

    with TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.json"
        file.write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}), encoding="utf-8")
        tokenizer = Wav2Vec2CTCTokenizer(str(file), word_delimiter_token=vocabulary[len(_SPECIAL)])
    return Wav2Vec2Processor(extractor, tokenizer)
