"""A ranker: one number for an answer to a prompt, higher for the better one, learned from pairs.

The loss of a pair is -log sigmoid of the difference of both numbers (Bradley and Terry 1952; Stiennon et al. 2020,
https://arxiv.org/abs/2009.01325). Numbers mean something only beside those of other answers to the same prompt. A model
that reads forward only scores a conversation put by its chat template; an encoder reads prompt and answer as a pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from afina.core.config import option
from afina.data.example import Example
from afina.errors import ConfigError, DataError
from afina.tasks.baselines import word_ridge
from afina.tasks.batches import pad_right
from afina.tasks.loading import load_base
from afina.tasks.pairs import longer_is_better, pair_figures
from afina.tasks.pooling import reads_forward_only
from afina.tasks.preferences import PAIRS, scored_pairs
from afina.tasks.prompts import TEMPLATES, Prompts, begin_token
from afina.tasks.task import Batch, Encoded, Feature, Figure, Rows, Task

__all__ = ["Reward", "RewardOptions"]


@dataclasses.dataclass
class RewardOptions:
    """How answers are put and pairs are weighed."""

    template: str = option(
        "own", "how conversations are put to a model that reads forward only: by the tokenizer's own chat template, or "
        "plain where it has none; plain; bare", choices=("own", *TEMPLATES),
    )  # fmt: skip
    label_smoothing: float = option(0.0, "share of pairs that are taken to stand the wrong way round", low=0.0, high=0.49)


class Reward(Task):
    """A number for an answer to a prompt, learned from pairs of a better and a worse one."""

    name = "reward"
    task_type = "SEQ_CLS"
    kind = PAIRS
    figures = {
        "accuracy": Figure("pairs ranked right", ".1%"),
        "margin": Figure("margin"),
        "loss": Figure("loss", better=-1),
    }
    Options: ClassVar[type] = RewardOptions
    options: RewardOptions
    smooths = False

    # --- model

    def load_model(self, path: str) -> Any:
        """The base with a head of one output."""
        from transformers import AutoConfig, AutoModelForSequenceClassification

        if "form" not in self.learned:
            forward = reads_forward_only(AutoConfig.from_pretrained(path))
            self.learned["form"] = "conversation" if forward else "pair"
            if forward:
                self._choose_template()
        if self.learned["form"] == "conversation":
            self.tokenizer.chat_template = self.learned["chat_template"]
        return load_base(self, AutoModelForSequenceClassification, path, num_labels=1)

    def _choose_template(self) -> None:
        """The template stays with the tokenizer and is saved with the task."""
        name, template = self.options.template, self.tokenizer.chat_template
        if self.tokenizer.eos_token is None:
            raise ConfigError("the tokenizer has no end token, so nothing says where an answer is over")
        if name != "own" or template is None:
            name = "plain" if name == "own" else name
            template = ("{{ bos_token }}" if begin_token(self.tokenizer) is not None else "") + TEMPLATES[name]
        self.learned |= {"template": name, "chat_template": template}

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Of a row "input_ids" and, of a pair, "pair_ids": the prompt with the better and with the worse answer. The prompt
        is cut where both are too long, from its beginning in a conversation."""
        if alone := [e.line for e in examples if not e.value.answers or not e.value.answers[0].strip()]:
            raise DataError(f"there is no answer to be scored (line {alone[0]}); name its column with data.text_pair")
        pairs = [(e, answer) for e in examples for answer in (e.value.answers if e.label else e.value.answers[:1])]
        rows, length, cut = (self._conversations if self.learned["form"] == "conversation" else self._pairs)(
            pairs, max_length, limit
        )
        features, place, truncated = list[Feature](), 0, 0
        for number, example in enumerate(examples):
            count = 2 if example.label else 1
            own, place = rows[place : place + count], place + count
            feature: Feature = {"input_ids": own[0][0], "row": number}
            if own[0][1]:
                feature["types"] = own[0][1]
            if example.label:
                feature["pair_ids"] = own[1][0]
                if own[1][1]:
                    feature["pair_types"] = own[1][1]
            truncated += any(cut[place - count : place])
            features.append(feature)
        said = {"own": "the tokenizer's own chat template", "plain": "### Instruction: and ### Response:",
                "bare": "the prompt, a line break, the answer"}  # fmt: skip
        put = said[self.learned["template"]] if "template" in self.learned else "a pair of texts"
        return Encoded(features, truncated, length, [f"prompt and answer are put as: {put}"])

    def _pairs(
        self, pairs: Sequence[tuple[Example, str]], max_length: int | None, limit: int
    ) -> tuple[list[tuple[list[int], list[int]]], int, list[bool]]:
        """Token ids and segments of prompt and answer, whether they were cut, and the length they may have."""
        first, second = [e.value.prompt for e, _ in pairs], [answer for _, answer in pairs]
        whole = self.tokenizer(first, second, truncation=False, padding=False)["input_ids"]
        length = min(limit, max(map(len, whole))) if max_length is None else max_length
        made = self.tokenizer(first, second, truncation=True, max_length=length, padding=False)
        types = made.get("token_type_ids") or [[] for _ in pairs]
        return [(list(a), list(b)) for a, b in zip(made["input_ids"], types, strict=True)], length, [
            len(ids) > length for ids in whole
        ]  # fmt: skip

    def _conversations(
        self, pairs: Sequence[tuple[Example, str]], max_length: int | None, limit: int
    ) -> tuple[list[tuple[list[int], list[int]]], int, list[bool]]:
        """As `_pairs`; the end of an answer stays, so that what is pooled always says the same: it is over."""
        prompts = Prompts(self.tokenizer)
        texts = ["".join(text for text, _ in prompts.parts([*map(dict, e.value.messages),
                 {"role": "assistant", "content": answer}])) for e, answer in pairs]  # fmt: skip
        begin, mark = begin_token(self.tokenizer), self.tokenizer.bos_token
        made = [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False, padding=False)["input_ids"]]
        if begin is not None:
            made = [ids if mark and text.startswith(mark) else [begin, *ids] for text, ids in zip(texts, made, strict=True)]
        made = [self._without_trailing_pads(ids) for ids in made]
        length = min(limit, max(map(len, made))) if max_length is None else max_length
        head = int(begin is not None)
        kept = [ids if len(ids) <= length else [*ids[:head], *ids[head - length :]] for ids in made]
        return [(ids, []) for ids in kept], length, [len(ids) > length for ids in made]

    def _without_trailing_pads(self, row: list[int]) -> list[int]:
        """An end token that is also the padding token would be taken for padding: texts end before it (T22)."""
        while len(row) > 1 and row[-1] == self.tokenizer.pad_token_id:
            row.pop()
        return row

    def collate(self, features: Sequence[Feature]) -> Batch:
        """All better answers and then all worse ones, `[answers, tokens]`; "rows" `[rows]` counts what is asked."""
        keys = [("input_ids", "types"), ("pair_ids", "pair_types")][: 2 if "pair_ids" in features[0] else 1]
        stacked = [
            {"input_ids": f[ids], **({"token_type_ids": f[types]} if types in f else {})}
            for ids, types in keys for f in features
        ]  # fmt: skip
        return {**pad_right(stacked, self.tokenizer.pad_token_id), "rows": torch.ones(len(features))}

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Its pairs."""
        return float(len(batch["rows"]))

    # --- loss

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """The number of each answer `[answers, 1]`, float32."""
        return super().logits(model, {k: v for k, v in batch.items() if k != "rows"})

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """The number of each answer `[answers]`, float32."""
        return self.logits(model, batch).squeeze(-1)

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """The loss of each pair, summed."""
        better, worse = self.outputs(model, batch).chunk(2)
        self.note(margin=better - worse, accuracy=(better > worse).float())
        return self.losses(better - worse).sum()

    def losses(self, apart: torch.Tensor) -> torch.Tensor:
        """The loss of each difference `[pairs]`."""
        share = self.options.label_smoothing
        return -(1 - share) * F.logsigmoid(apart) - share * F.logsigmoid(-apart)

    # --- answers

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """The numbers of each row's answers."""
        return self.outputs(model, batch).double().view(-1, len(batch["rows"])).T.tolist()  # type: ignore[no-any-return]

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """See `pair_figures`."""
        apart = torch.tensor([a - b for a, b in answers], dtype=torch.float64)
        return {"rows": len(examples), **pair_figures(answers), "loss": float(self.losses(apart).mean())}

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """The length of the answers, and their words."""
        learned, asked = scored_pairs(train.examples), scored_pairs(test.examples)
        title, scores = longer_is_better(learned, asked)
        texts = [text for pair in learned for text in pair]
        flat = word_ridge(texts, np.tile([1.0, 0.0], len(learned)), [text for pair in asked for text in pair])
        made: dict[str, tuple[str, Sequence[Sequence[float]]]]
        made = {"words": ("words of the answer counted", flat.reshape(-1, 2).tolist()), "length": (title, scores)}
        return {key: {"title": title, "rows": len(asked), **pair_figures(s)} for key, (title, s) in made.items()}

    def right(self, answer: Any, example: Example) -> bool | None:
        """Whether the better answer has the higher number."""
        return answer[0] > answer[1] if len(answer) > 1 else None

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The number of the answer, which in a pair is the better one."""
        made = {"answer": f"{answer[0]:.6f}"}
        return made if len(answer) == 1 else {**made, "worse": f"{answer[1]:.6f}", "margin": f"{answer[0] - answer[1]:.6f}"}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """The number."""
        return {"reward": answer[0]}

    # --- what is shown

    def rendered(self, feature: Feature) -> tuple[list[str], list[bool]]:
        """The prompt with the better answer."""
        ids = feature["input_ids"]
        return self.tokenizer.convert_ids_to_tokens(ids), [False] * len(ids)
