"""What a task is: what a row means, the model class, the batch, the loss, the answers, their figures.

A run goes: `kind` makes examples of the rows of a file; `learn` looks at them (which labels are there); `load_model`;
`encode` turns examples into features, which are what the model reads; `collate` makes a batch of features; `loss_sum` is
what is trained. To measure, `answers` reads a batch and returns one small answer a feature (never all logits, T32),
`join` makes one an example of them, and `metrics` makes figures of those. A task is one file.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from afina.data.example import Example, Kind
from afina.errors import ConfigError
from afina.memory.storage import Storage

__all__ = ["Batch", "Encoded", "Feature", "Figure", "NoOptions", "Rows", "Task", "length_of"]

Batch = dict[str, torch.Tensor]
# "row": number of its example; "input_ids": list of token ids, or else "length"; and what else the task needs. JSON.
Feature = dict[str, Any]
IGNORED = -100  # a target that counts nowhere
NO_LIMIT = 1_000_000  # tokenizers without a limit name an absurd one


@dataclass(frozen=True)
class Figure:
    """A figure that is shown."""

    title: str
    form: str = ".3f"  # as in format(): ".1%" or ".3f"
    better: int = 1  # -1 where less is better
    final: bool = False  # of the test rows alone, so that it cannot choose the weights

    def shown(self, value: Any) -> str:
        """The figure as text; a dash where there is none."""
        return "-" if value is None else format(value, self.form)


@dataclass
class Encoded:
    """Features of a list of examples, in its order, and how many examples were cut off.

    All that is to be known of the encoding is here, and nothing on the task: it may come from a cache.
    """

    features: Sequence[Feature]
    truncated: int
    max_length: int | None  # of tokens; None where rows are no tokens
    notes: list[str] = field(default_factory=list)  # what was found out, as sentences for a person

    @property
    def lengths(self) -> list[int]:
        """Tokens of each feature, or what else its length is measured in."""
        return [f["length"] if "length" in f else len(f["input_ids"]) for f in self.features]


def length_of(feature: Feature) -> int:
    """Its tokens, of a second text or on the other side of a model with a decoder too; "length" where that is said."""
    keys = ("input_ids", "decoder_ids", "pair_ids")
    return int(feature.get("length", 0)) + sum(len(feature.get(key, ())) for key in keys)


@dataclass
class Rows:
    """One side of a split: its examples, and their features (`feature["row"]` counts within these examples)."""

    examples: list[Example]
    features: Sequence[Feature]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each feature, of a second text or on the other side of a model with a decoder too."""
        return [length_of(f) for f in self.features]

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of each feature."""
        return [f["input_ids"] for f in self.features]


@dataclass
class NoOptions:
    """A task without options of its own."""


class Task(ABC):
    """The interface. `options` are those of the recipe's `task`, `learned` is what `learn` returned (it is saved)."""

    name: ClassVar[str]
    task_type: ClassVar[str | None]  # PEFT's name for the kind of model
    kind: Kind  # of an instance, as its options say: see kind_for
    figures: ClassVar[Mapping[str, Figure]]  # keys of `metrics` that are shown; the first chooses the weights that are kept
    Options: ClassVar[type] = NoOptions  # a dataclass of `option` fields
    smooths: ClassVar[bool] = True  # whether label smoothing means something
    widens: ClassVar[bool] = False  # whether `collate` may pad a batch to more than its longest row, as `width` says
    packs: ClassVar[bool] = False  # whether its training rows may be packed into one
    untuned: ClassVar[bool] = False  # the base answers without training too: its figures are a baseline
    # What makes the model's input: a tokenizer, image_processor, feature_extractor, for speech the last, with a tokenizer
    # where the model has one, or for a document a tokenizer, with an image_processor where the model looks at pages.
    processor_kind: ClassVar[str] = "tokenizer"
    unit: ClassVar[str] = "tokens"  # what lengths count
    reads_files: bool = False  # features name files, which `ready` reads; of a class: features of some bases do
    shows_before: ClassVar[bool] = False  # and what it answered is shown beside the answers
    compares: ClassVar[bool] = False  # the model is measured against a frozen reference (tasks/reference.py)
    refers: ClassVar[bool] = False  # the loss compares a training row with what the reference makes of it
    writes_rows: ClassVar[bool] = False  # what is learned from is written by the model itself, in every step
    pipelines: ClassVar[bool] = False  # the base is a pipeline of diffusers

    storage = Storage()  # of the base's weights, which load_model follows
    packed = False  # whether training rows are packed, which is tried first
    widths = (1, 0)  # batches are padded to a multiple of the first, but for that to no more than the second
    label_smoothing = 0.0  # of the training loss; figures do not know it
    class_weights: Sequence[float] | None = None  # of the training loss, one a label

    def __init__(self, processor: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        self.processor = processor
        # the part of it that knows tokens; None where nothing is read or written in them
        tokenizer: Any = processor if self.processor_kind == "tokenizer" else getattr(processor, "tokenizer", None)
        self.tokenizer = tokenizer
        self.options = self.Options() if options is None else options
        self.learned = dict(learned or {})
        self.noted: dict[str, torch.Tensor] = {}  # sum and count of each figure of the step under way
        if tokenizer is not None and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer is not None and tokenizer.pad_token is None:
            raise ConfigError("the tokenizer has neither a padding, an end nor an unknown token, so rows cannot be padded")

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of the model's outputs; none where the task has none."""
        return list(self.learned.get("labels", []))

    @classmethod
    def kind_for(cls, options: Mapping[str, Any]) -> Kind:
        """What reading must know where that depends on the options of the recipe's `task`."""
        return cls.kind

    @classmethod
    def for_base(cls, config: Any) -> type[Task]:
        """This task for a base of that configuration: another class where bases take different ways. Raises ConfigError
        where it takes none."""
        return cls

    @classmethod
    def wrong_options(cls, options: Any) -> list[str]:
        """What is wrong with options that are each in their limits, as `KEY ...`."""
        return []

    @classmethod
    def method_defaults(cls, method: str) -> dict[str, Any]:
        """Options of a method that suit this task, where the recipe says nothing."""
        return {}

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """What the model and the loss must know of the data; JSON. The labels, for tasks that have them."""
        return {}

    def weights(self, of_classes: Mapping[str, float]) -> list[float]:
        """Weights of the labels in the loss, in their order, from those of the classes of the training rows."""
        if self.kind.labels != "class" or set(of_classes) != set(self.labels):
            raise ConfigError(f"data.balance=class_weights: {self.name} has no classes of rows that could weigh more")
        return [of_classes[label] for label in self.labels]

    def check_options(self, spell: Callable[[str], str]) -> None:  # noqa: B027 (most name nothing)
        """Look for what the options name outside the recipe. Raises ConfigError with what is not there."""

    # --- model

    @abstractmethod
    def load_model(self, path: str) -> Any:
        """The base model with a head for this task, stored as `storage` says. Raises ConfigError where there is none."""

    def idle(self, model: Any) -> list[str]:
        """Modules of the base that this task never runs, so that there is nothing to adapt in them."""
        return []

    def limit(self, model: Any) -> int:
        """The most tokens that model and tokenizer can take."""
        positions = getattr(model.config, "max_position_embeddings", None) or NO_LIMIT
        for module in model.modules():  # RoBERTa's positions begin after the one that means padding
            table: Any = getattr(module, "position_embeddings", None)
            if getattr(table, "padding_idx", None) is not None:
                positions = min(positions, table.num_embeddings - table.padding_idx - 1)
        return int(min(positions, self.tokenizer.model_max_length or NO_LIMIT))

    def asked_length(self, trained: int, limit: int) -> int:
        """Tokens that a text may have when the model is asked, from the length it was trained with and its limit."""
        return trained

    def paths(self, model: Any) -> list[str]:
        """What is to be known of the way an adapted model is computed, as sentences for a person (T35)."""
        return []

    # --- rows

    @abstractmethod
    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Features of at most `max_length` tokens; None: of the longest example, up to `limit`.

        Examples without a label get features without targets. Raises DataError for what cannot be trained on.
        """

    @classmethod
    def stand_ins(cls, options: Any) -> list[Example] | None:
        """Two examples as large as they come, for a plan without a file; None: rows of words of a stated length."""
        return None

    def ready(self, feature: Feature, chance: str | None = None) -> Feature:
        """The feature with what its file holds, so that `collate` need not read it; other threads call this ahead of a step.

        `chance` seeds what is drawn of a training row; None: nothing is drawn.
        """
        return feature

    def width(self, features: Sequence[Feature]) -> int:
        """Tokens that a batch of these is padded to: those of its longest, rounded up as `widths` says."""
        longest = max(len(f["input_ids"]) for f in features)
        multiple, most = self.widths
        return max(longest, min(-(-longest // multiple) * multiple, most))

    @property
    def varies(self) -> str:
        """What makes a training row another in every epoch, as it is typed; "" where it stays the same."""
        return ""

    @abstractmethod
    def collate(self, features: Sequence[Feature]) -> Batch:
        """One batch, padded; "attention_mask" counts as tokens read; targets where the features have them.

        Features that `ready` has not seen are read here.
        """

    def amount(self, batch: Batch) -> int:
        """What a batch holds, in `unit`."""
        return int(batch["attention_mask"].sum())

    # --- training

    @abstractmethod
    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """The loss, summed over the targets of the batch; the step divides by all its targets (T25)."""

    @abstractmethod
    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """How many targets a batch holds (their weights, where they have weights)."""

    @property
    def parts_share(self) -> bool:
        """Whether the loss of a row depends on the other rows of its step, so that parts must know of each other (T25)."""
        return False

    def share(self, model: Any, parts: Sequence[Batch], gather: Callable[[Any], list[Any]], process: int) -> None:
        """Put into the parts what they must know of the whole step; `gather` returns a value of every process."""
        raise NotImplementedError(f"{self.name} says that parts share, and not what")

    def reference_answers(self, model: Any, batch: Batch) -> list[Any]:
        """What the reference makes of each feature, as numbers; the feature then holds them as "reference"."""
        raise NotImplementedError(f"{self.name} says that it refers, and not to what")

    @property
    def repeats(self) -> int:
        """Steps in a row that are made with the same rows."""
        return 1

    def begin_step(self, step: int) -> None:  # noqa: B027 (most need not know)
        """Step `step`, from 1, is computed next, or again where memory ran out; every process is told."""

    def note(self, **values: torch.Tensor) -> None:
        """Figures of rows of the step under way, whose means are logged with it."""
        for name, value in values.items():
            now = torch.stack([value.detach().float().sum(), torch.tensor(float(value.numel()), device=value.device)])
            self.noted[name] = self.noted[name] + now if name in self.noted else now

    def noticed(self, step: int, noted: Mapping[str, float], *, last: bool) -> list[str]:
        """What whoever watches the run must be told after a step, from its figures, as sentences that stay with the run."""
        return []

    @property
    def untaught(self) -> str:
        """Why nothing may have been learned so far, where that is known and may change; "" otherwise."""
        return ""

    def kept(self) -> dict[str, Any]:
        """What a checkpoint must hold of this process, so that the run goes on as if it had not stopped; tensors and plain
        values."""
        return {}

    def keep(self, kept: Sequence[dict[str, Any]]) -> None:  # noqa: B027 (most hold nothing)
        """What `kept` returned, of every process there was."""

    # --- answers

    @abstractmethod
    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """One small answer a feature: what `metrics` needs, on the CPU."""

    def final_answers(self, model: Any, batch: Batch) -> list[Any]:
        """As `answers`, for the test rows and for `afina predict`; here a task generates text."""
        return self.answers(model, batch)

    def join(self, answers: Sequence[Any], rows: Rows) -> list[Any]:
        """One answer an example, where an example may have several features."""
        return list(answers)

    @property
    def settles(self) -> bool:
        """Whether something is to be chosen on the validation rows once training is over."""
        return False

    def settle(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """What is chosen on the validation rows (a temperature, thresholds), to be added to `learned`; JSON."""
        return {}

    @abstractmethod
    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """Figures as JSON: "rows", "loss", and at least the keys of `figures`."""

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """The same figures for answers that need no model, each with a "title"."""
        return {}

    def right(self, answer: Any, example: Example) -> bool | None:
        """Whether an answer is right; None where that is no question of yes and no."""
        return None

    @abstractmethod
    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The answer as columns of a CSV file: "answer" first, then for example p(LABEL)."""

    def tabled(self, answers: Sequence[Any], examples: Sequence[Example]) -> list[dict[str, str]]:
        """As `columns`, of all test rows, which may say of a row what follows from the others."""
        return [self.columns(answer, example) for answer, example in zip(answers, examples, strict=True)]

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """The answer as JSON, for `afina predict --json`."""
        return dict(self.columns(answer, example))

    def arrays(self, answers: Sequence[Any | None]) -> dict[str, Any]:
        """Numpy arrays of answers, a row each (None: not a number), for .npz files. Raises ConfigError where none are."""
        raise ConfigError(f"{self.name} answers with no vectors, so there is nothing for a .npz file; write a .csv")

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Numbers between 0 and 1, or nearly, that two equal models agree on: compared when an adapter is read back."""
        return torch.softmax(self.logits(model, batch).double(), dim=-1)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Scores of the model in float32."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return model(**inputs).logits.float()  # type: ignore[no-any-return]

    def finish(self, model: Any, folder: Path, features: Sequence[Feature]) -> dict[str, Any]:
        """Write what is wanted of a run beside its adapter, for metrics.json; `model` has that adapter, read back, and
        `features` are some test rows."""
        return {}

    # --- what is shown

    def rendered(self, feature: Feature) -> tuple[list[str], list[bool]]:
        """The tokens of a feature as the model gets them, and which of them are targets; words that describe it where it has
        no tokens."""
        ids, labels = feature["input_ids"], feature.get("labels")
        aimed = [label != IGNORED for label in labels] if isinstance(labels, list) and len(labels) == len(ids) else []
        return self.tokenizer.convert_ids_to_tokens(ids), aimed or [False] * len(ids)

    def settings(self) -> dict[str, Any]:
        """What makes this task again: for the run folder."""
        return {"name": self.name, "options": dataclasses.asdict(self.options), **self.learned}
