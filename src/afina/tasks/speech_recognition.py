"""Writing down what is said in a recording: what both ways of it have in common.

The base decides which way is taken: an encoder of sound and a decoder that writes token by token (Whisper and its kin,
`speech_seq2seq`), or a letter for every stretch of sound (wav2vec 2.0 and its kin, `speech_ctc`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from afina.core.config import option
from afina.data.example import Column, Example, Kind
from afina.data.sounds import SOUND
from afina.errors import ConfigError, DataError, Problems
from afina.tasks.sounds import SoundOptions, SoundTask
from afina.tasks.task import Figure, Rows, Task
from afina.tasks.transcripts import CASES, check_jiwer, error_rates, spelled, word_errors

__all__ = ["SpeechOptions", "SpeechRecognition"]

_NAMED = 5  # rows named in an error


@dataclasses.dataclass
class SpeechOptions(SoundOptions):
    """What a recipe may say of it."""

    case: str = option("as_written", "letters of the transcripts that are learned: as they are, or all small or capital",
                       choices=CASES)  # fmt: skip
    punctuation: bool = option(True, "learn the punctuation of the transcripts; false: it is left out of them")
    language: str = option("", "language that is spoken, for example english or en; of models that know several")
    speech_task: str = option("transcribe", "write what is said, or its translation into English",
                              choices=("transcribe", "translate"))  # fmt: skip
    generate: bool = option(True, "write the texts of test rows and compare them with those expected")
    generate_rows: int = option(1000, "test rows whose texts are written at most, the first of them", low=1)
    max_new_tokens: int = option(200, "tokens of a written text at most, as far as the model's positions go", low=1)
    num_beams: int = option(1, "texts that are followed at once; 1 takes the likeliest token each time", low=1)


def make(row: Mapping[str, str], line: int | str) -> Example:
    """A path and what is said there."""
    return Example(row["audio"], row.get("label", ""), line, row["audio"])


class SpeechRecognition(SoundTask):
    """Writing down what is said in a recording."""

    name = "speech_recognition"
    task_type = None
    smooths = False
    untuned = True
    processor_kind: ClassVar[str] = "speech"
    kind = Kind(
        columns={
            "audio": Column("the path of the recording",
                            ("audio", "file_name", "file", "path", "filename", "audio_path", "wav"),
                            repair=False, medium=SOUND),
            "label": Column("what is said", ("transcription", "transcript", "sentence", "text", "normalized_text", "label")),
        },
        labels="text",
        make=make,
    )  # fmt: skip
    figures: ClassVar[Mapping[str, Figure]] = {
        "loss": Figure("loss per token", better=-1),
        "wer": Figure("word error rate", ".1%", better=-1, final=True),
        "cer": Figure("character error rate", ".1%", better=-1, final=True),
        "wer_as_written": Figure("word error rate with case and punctuation", ".1%", better=-1, final=True),
    }
    Options: ClassVar[type] = SpeechOptions
    auto: ClassVar[str] = ""  # transformers' class that loads the bases of a way
    before = ""  # every transcript, where it becomes tokens

    def __init__(self, processor: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(processor, options, learned)
        check_jiwer()

    @classmethod
    def for_base(cls, config: Any) -> type[Task]:
        """The way that a base of this configuration takes. Raises ConfigError where it takes none."""
        import transformers

        ways = SpeechRecognition.__subclasses__()
        for way in ways:
            if type(config) in getattr(transformers, way.auto)._model_mapping:
                return way
        raise ConfigError(
            f"{cls.name} needs a model that writes down speech, such as openai/whisper-small or "
            f"facebook/wav2vec2-base-960h; transformers has none of the architecture {config.model_type}"
        )

    @classmethod
    def stand_ins(cls, options: Any) -> list[Example] | None:
        """Two recordings as long as they are read at most, and as much said in them as can be said in that time."""
        words = " ".join("a" * int(4 * options.max_seconds))
        return [Example(said, said, i, "") for i, said in enumerate((words, f"{words} a"), 1)]

    # --- rows

    def reference(self, example: Example) -> str:
        """The transcript as it is to be written."""
        return spelled(example.label, self.options.case, self.options.punctuation)

    def spoken(self, examples: Sequence[Example]) -> list[list[int]]:
        """The tokens of each transcript; none of a row without one. Raises DataError naming those that leave no token."""
        plain: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        texts = [self.reference(e) for e in examples]
        found = [list(self.tokenizer(self.before + text, **plain)["input_ids"]) if text else [] for text in texts]
        empty = [f"line {e.line}: the transcript {e.label[:40]!r} has no token to be learned"
                 for e, ids in zip(examples, found, strict=True) if e.label and not ids]  # fmt: skip
        refuse("transcripts", empty, "Write what is said there, or take these rows out.")
        return found

    # --- figures

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The written text; loss and number of its targets, words expected and how many are wrong, where they are known."""
        made = {"answer": answer.text or ""}
        loss, tokens = self.known(answer)
        if tokens:
            made |= {"loss": f"{loss / tokens:.6f}", "tokens": str(tokens)}
        if example.label and answer.text is not None:
            wrong, words = word_errors(self.reference(example), answer.text)
            made |= {"wrong_words": str(wrong), "words": str(words)}
        return made

    def known(self, answer: Any) -> tuple[float, int]:
        """Summed loss and number of the targets of an answer."""
        raise NotImplementedError

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """The commonest transcript of training, whatever is said."""
        commonest, _ = Counter(self.reference(e) for e in train.examples).most_common(1)[0]
        right = [self.reference(e) for e in test.examples]
        rates = error_rates([commonest] * len(right), right)
        return {"commonest": {"title": "the commonest transcript, whatever is said", "rows": len(right), **rates}}

    def rows_in(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Recordings of a batch."""
        return len(batch["samples"])


def refuse(what: str, wrong: Sequence[str], cure: str) -> None:
    """Raise DataError with the first of what is wrong, how many more there are, and the cure."""
    problems = Problems(f"the {what}")
    for line in wrong[:_NAMED]:
        problems.add(line)
    more = f"{len(wrong) - _NAMED} more rows are like that. " if len(wrong) > _NAMED else ""
    problems.raise_as(DataError, f"{more}{cure}")
