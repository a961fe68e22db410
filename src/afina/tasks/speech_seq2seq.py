"""Writing down speech with an encoder of sound and a decoder of text: Whisper and its kin.

Whisper's decoder first reads what it is to do (`<|startoftranscript|><|en|><|transcribe|><|notimestamps|>`), others a start
token. That is no target; the transcript behind it is, one place later. It writes on from the same tokens, greedily or by
beams, so that what is measured is what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from afina.data.example import Example
from afina.errors import ConfigError
from afina.tasks.decoding import DecoderTask
from afina.tasks.loading import load_base
from afina.tasks.sounds import SoundTask, steady, still
from afina.tasks.speech_recognition import SpeechRecognition
from afina.tasks.task import IGNORED, NO_LIMIT, Batch, Encoded, Feature, Figure, Rows
from afina.tasks.transcripts import error_rates, word_errors
from afina.tasks.writing import WritingTask

__all__ = ["SpeechSeq2Seq"]


class SpeechSeq2Seq(SpeechRecognition, DecoderTask):
    """Writing down what is said, token by token."""

    auto = "AutoModelForSpeechSeq2Seq"
    figures = {
        "loss": Figure("loss per token", better=-1),
        "perplexity": Figure("perplexity", ".2f", better=-1),
        "token_accuracy": Figure("tokens foretold", ".1%"),
        **{key: figure for key, figure in SpeechRecognition.figures.items() if figure.final},
    }

    def __init__(self, processor: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        if not hasattr(processor, "tokenizer"):
            raise ConfigError(
                f"{self.name}: this model writes with a decoder and has no tokenizer beside it; take one that has, such as "
                "openai/whisper-small"
            )
        super().__init__(processor, options, learned)
        language, knows = self.options.language, hasattr(self.tokenizer, "set_prefix_tokens")
        if language and not knows:
            raise ConfigError(f"task.language={language}: this model is not told its language; leave it out")
        if self.options.speech_task != "transcribe" and not language:
            raise ConfigError("task.speech_task=translate goes with task.language, and a model that knows several languages")
        if knows:
            self.before = " "  # as Whisper itself writes
            asked = {"language": language, "task": self.options.speech_task} if language else {}
            try:
                self.tokenizer.set_prefix_tokens(predict_timestamps=False, **asked)
                self.learned["begin"] = list(self.tokenizer.prefix_tokens)
            except ValueError as error:
                raise ConfigError(f"task.language={language}: {error}") from None

    # --- model

    def load_model(self, path: str) -> Any:
        """The base, of which nothing may be missing."""
        from transformers import AutoModelForSpeechSeq2Seq

        model = load_base(self, AutoModelForSpeechSeq2Seq, path, heads=(), **steady(path))
        for module in model.modules():  # of two models put together each has settings of its own
            still(getattr(module, "config", None))
        if not model.config.is_encoder_decoder:
            raise ConfigError(f"model {path}: {type(model).__name__} has no decoder of its own, which {self.name} needs")
        if any(isinstance(module, torch.nn.GroupNorm) for module in model.get_encoder().modules()):
            raise ConfigError(
                f"model {path}: the GroupNorm of its encoder would see the padding of shorter recordings, and hear "
                "another thing beside longer ones; take a model without it, such as openai/whisper-small"
            )
        if getattr(model.generation_config, "is_multilingual", False) and not self.options.language:
            raise ConfigError(
                "task.language is missing: this model knows several languages and is told which one it hears, for example "
                "task.language=english"
            )
        start = getattr(model.config, "decoder_start_token_id", None)
        start = model.generation_config.decoder_start_token_id if start is None else start
        if start is None and "begin" not in self.learned:
            raise ConfigError(f"model {path}: its configuration names no decoder_start_token_id to begin transcripts with")
        self.learned.setdefault("begin", [start])
        self.learned["target_limit"] = _positions(model.config)
        return model

    def paths(self, model: Any) -> list[str]:
        """Whether logits have to be made whole, and why."""
        return [*SoundTask.paths(self, model), *WritingTask.paths(self, model)]

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Paths and lengths; what the decoder reads and its targets, where examples have them, each counted that was cut."""
        made = super().encode(examples, max_length, limit)
        longest, begin, cut = self.learned.get("target_limit", NO_LIMIT), self.learned["begin"], 0
        for feature, example, text in zip(made.features, examples, self.spoken(examples), strict=True):
            if not example.label:
                continue
            whole = [*begin, *text, self.tokenizer.eos_token_id]
            cut += len(whole) - 1 > longest
            feature["decoder_ids"] = whole[:-1][:longest]
            feature["labels"] = [*[IGNORED] * (len(begin) - 1), *whole[len(begin) :]][:longest]
        if cut:
            made.notes.append(f"{cut} transcripts are cut at their end to {longest} tokens; no end is learned there")
            made.truncated += cut
        return made

    def collate(self, features: Sequence[Feature]) -> Batch:
        """What the encoder reads, what the decoder reads, and labels; see `decoded`."""
        return {**super().collate(features), **self.decoded(features)}

    # --- targets and answers

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        """The recordings, and what the decoder reads."""
        return {**self.heard(batch), "decoder_input_ids": batch["decoder_input_ids"]}

    def logits(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores of the decoder in float32."""
        return model(**self.inputs(batch)).logits.float()  # type: ignore[no-any-return]

    def questions(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """What the decoder begins with, for the rows that are asked for a text."""
        rows = batch["asked"].nonzero(as_tuple=True)[0]
        ids = torch.tensor([self.learned["begin"]] * len(rows), device=rows.device)
        return ids, torch.ones_like(ids), rows.tolist()

    def room(self, model: Any, width: int) -> int:
        """Positions of the decoder after `width` tokens."""
        return int(self.learned["target_limit"]) - width

    def ends(self, model: Any) -> list[int]:
        """The tokenizer's end token, and those the checkpoint itself stops at."""
        own = model.generation_config.eos_token_id
        return sorted({self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})

    @torch.no_grad()
    def final_answers(self, model: Any, batch: Batch) -> list[Any]:
        """As `answers`, with the text of every row that is asked for one."""
        made = self.answers(model, batch)
        ids, _, rows = self.questions(model, batch)
        if not rows:
            return made
        from transformers import GenerationConfig, GenerationMixin

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        own = base.generation_config
        # nothing of the checkpoint's own: no language is guessed, no token forbidden
        settings = GenerationConfig(
            max_new_tokens=min(self.options.max_new_tokens, self.room(model, ids.shape[1])), do_sample=False,
            num_beams=self.options.num_beams, eos_token_id=self.ends(base), pad_token_id=self.tokenizer.pad_token_id,
            decoder_start_token_id=self.learned["begin"][0],
        )  # fmt: skip
        base.generation_config = settings
        try:
            heard: dict[str, Any] = {key: value[rows] for key, value in self.heard(batch).items()}
            # Whisper's own `generate` cuts long recordings into pieces and tries again at other temperatures
            generate: Any = GenerationMixin.generate
            write = partial(generate, base) if isinstance(base, GenerationMixin) else base.generate
            written = write(**heard, decoder_input_ids=ids, generation_config=settings)
        finally:
            base.generation_config = own
        for row, tokens in zip(rows, written[:, ids.shape[1] :].tolist(), strict=True):
            made[row].text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return made

    # --- figures

    def known(self, answer: Any) -> tuple[float, int]:
        """Summed loss and number of the targets of an answer."""
        return answer.foretold.loss, answer.foretold.tokens

    def text_figures(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Error rates over all words and characters; of several transcripts of one recording the nearest counts."""
        nearest = [min(known, key=lambda right: word_errors(right, answer)[0])
                   for answer, known in zip(answers, references, strict=True)]  # fmt: skip
        return error_rates(answers, nearest)

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """The commonest transcript; tokens as frequent as in training."""
        return {**SpeechRecognition.baselines(self, train, test), **WritingTask.baselines(self, train, test)}

    def rendered(self, feature: Feature) -> tuple[list[str], list[bool]]:
        """Its length, then the tokens that the decoder reads and foretells."""
        said = [f"{feature['length'] / self.rate:.2f} seconds"]
        if "labels" not in feature:
            return said, [False]
        begun, aimed = self.learned["begin"], [label for label in feature["labels"] if label != IGNORED]
        tokens = self.tokenizer.convert_ids_to_tokens([*begun, *aimed])
        return [*said, *tokens], [False] * (1 + len(begun)) + [True] * len(aimed)


def _positions(config: Any) -> int:
    """The most tokens that a decoder reads."""
    config = getattr(config, "decoder", config)
    for name in ("max_target_positions", "max_position_embeddings", "n_positions"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return NO_LIMIT
