"""Answers that the model writes itself, made likelier where a reward is high: GRPO.

A row is a prompt. In every step the model writes `group` answers to each, a reward says how good they are, and the advantage
of an answer is its reward less the mean of its group, over the group's standard deviation. With ratio the probability of a
token beside what it was when the answer was written, the loss of an answer is the mean over its tokens of

    -min(ratio advantage, clip(ratio, 1 - clip, 1 + clip) advantage) + beta KL

where KL = exp(d) - d - 1, d being by how much likelier the reference finds the token (Schulman's estimate: never negative).
Shao et al. 2024, https://arxiv.org/abs/2402.03300. Clipping matters where one group of answers is learned from several
times (`updates`).

What is drawn follows from seed, step, row and number of the answer alone: not from how a step is divided into parts and
among processes, and a run that goes on writes what it would have written. Figures are of one answer a row, drawn with the
same numbers each time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch

from afina.core.config import option
from afina.data.example import Example
from afina.errors import ConfigError
from afina.tasks.batches import has_values, pad_right, padded
from afina.tasks.generation import drawn, left_padded
from afina.tasks.head_loss import divergences, target_losses
from afina.tasks.policy import Policy
from afina.tasks.preferences import PROMPTS
from afina.tasks.prompts import TEMPLATES
from afina.tasks.reference import has_reference, reference
from afina.tasks.reward_functions import Rewards, Told, find_rewards
from afina.tasks.task import IGNORED, Batch, Encoded, Feature, Figure, Rows

__all__ = ["GRPO", "GRPOOptions", "Story"]

_LEAST = 1e-4  # added to the standard deviation of a group's rewards
_PROMPT = 8  # tokens of a prompt that must fit beside an answer
_STRETCH = 5  # steps in a row that taught nothing, which are told
_CURE = (
    "let the reward grade answers (how near, not only whether), or take a larger task.group or task.temperature, or prompts "
    "that the model sometimes answers well"
)


@dataclasses.dataclass
class GRPOOptions:
    """What a recipe may say of it."""

    train_on: ClassVar[str] = "answers"
    generate: ClassVar[bool] = True
    num_beams: ClassVar[int] = 1
    reward: str = option("", "what says how good an answer is: FILE.py:function, or a run of the task reward; see the docs")
    group: int = option(8, "answers that are written to each prompt in a step", low=2)
    max_new_tokens: int = option(128, "tokens of an answer at most", low=1)
    temperature: float = option(1.0, "of drawing; lower is closer to the likeliest answer", low=0.01, high=10.0)
    beta: float = option(0.04, "how much it costs to leave the reference; 0: nothing", low=0.0)
    clip: float = option(0.2, "how far a token's probability may move before it is moved no further", low=0.001, high=10.0)
    updates: int = option(1, "steps that learn from the same answers", low=1)
    template: str = option(
        "own", "how prompts are put: by the tokenizer's own chat template, or plain where it has none; plain "
        "(### Instruction: and ### Response:); bare (the prompt, a line break, the answer); none (the answer continues it)",
        choices=("own", *TEMPLATES, "none"),
    )  # fmt: skip


@dataclass
class Story:
    """An answer that was written: its text and tokens, its reward, the divergence over its tokens, whether it ended."""

    text: str
    tokens: int = 0
    reward: float | None = None
    divergence: float | None = 0.0  # None where there was no reference to measure it from
    ended: bool = False


@dataclass
class Written:
    """The answers of a step: token ids of prompts and answers, the advantage of each answer `[answers]`, and the
    log-probabilities of their tokens when they were written, where these are known."""

    prompts: list[list[int]]
    answers: list[list[int]]
    advantages: list[float]
    before: list[list[float]] | None = None


class GRPO(Policy):
    """Reinforcement learning on answers that the model writes, with rewards of your own."""

    name = "grpo"
    kind = PROMPTS
    figures = {
        "reward": Figure("reward"),
        "kl": Figure("KL per token", ".4f", better=-1),
        "ended": Figure("answers that end", ".1%"),
        "loss": Figure("loss", better=-1),
    }
    Options: ClassVar[type] = GRPOOptions
    options: GRPOOptions  # type: ignore[assignment]
    refers = False
    writes_rows = True
    untuned = True
    shows_before = True

    def __init__(self, tokenizer: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(tokenizer, options, learned)
        self.step = 0
        self.held: dict[int, dict[str, Any]] = {}  # answers that are learned from again, by row
        # steps that wrote, those of them in which no prompt's answers differed in reward, how many of these there were in a
        # row, and whether that has been told
        self.writing, self.even, self.stretch, self.told = 0, 0, 0, False

    @cached_property
    def rewards(self) -> Rewards:
        """What says how good an answer is."""
        return find_rewards(self.options.reward)

    def check_options(self, spell: Callable[[str], str]) -> None:
        """Load the rewards. Raises ConfigError with all that is wrong with them."""
        self.rewards = find_rewards(self.options.reward, spell("task.reward"))  # type: ignore[misc]

    # --- rows

    def limit(self, model: Any) -> int:
        """The most tokens of a prompt: there is room for an answer behind it. Raises ConfigError where there is none."""
        whole = super().limit(model)
        room = whole - self.options.max_new_tokens
        if room < _PROMPT:
            raise ConfigError(
                f"task.max_new_tokens={self.options.max_new_tokens}: the model takes {whole} tokens, so that {max(0, room)} "
                "would be left to the prompt; take fewer"
            )
        return room

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Prompts, and what a reward is told of them."""
        made = super().encode([replace(e, label="") for e in examples], max_length, limit)
        features = []
        for feature in made.features:
            example = examples[feature["row"]]
            told = {"prompt": example.value.prompt, "label": example.value.label, "messages": list(example.value.messages)}
            features.append({**feature, "told": json.dumps(told)} if example.label else feature)
        return Encoded(features, made.truncated, made.max_length, made.notes)

    def _texts(self, example: Example) -> list[list[tuple[str, bool]]]:
        """With the template `none` a prompt stands as it is."""
        return super()._texts(example) if self.options.template != "none" else [[(example.value.prompt, False)]]

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Prompts `[rows, tokens]`, padded on the right; "number" `[rows]`, and "told", JSON in bytes, `[rows, bytes]`."""
        batch = pad_right([{"input_ids": f["input_ids"]} for f in features], self.tokenizer.pad_token_id)
        batch["answer_at"] = torch.tensor([f["answer_at"] for f in features])
        batch["number"] = torch.tensor([f["row"] for f in features])
        if all("told" in f for f in features):
            batch["told"] = padded([list(f["told"].encode()) for f in features], 0).to(torch.uint8)
        return batch

    def _told(self, batch: Batch) -> list[Told]:
        made = []
        for row in batch["told"].cpu().numpy():
            said = json.loads(row.tobytes().rstrip(b"\0").decode())
            made.append(Told(said["prompt"], said["label"], tuple(said["messages"])))
        return made

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Its answers: `group` a row."""
        return float(len(batch["answer_at"]) * self.options.group)

    # --- writing

    @property
    def repeats(self) -> int:
        """Steps that learn from the same answers."""
        return self.options.updates

    def begin_step(self, step: int) -> None:
        """Answers are written in the first of `updates` steps."""
        self.step = step
        if (step - 1) % self.options.updates == 0:
            self.held = {}

    def kept(self) -> dict[str, Any]:
        """How often rewards were even, and answers that are learned from again."""
        counts = {"even": [self.writing, self.even, self.stretch, self.told]}
        return {**counts, "held": self.held} if self.step % self.options.updates else counts

    def keep(self, kept: Sequence[dict[str, Any]]) -> None:
        """Of every process, since rows may lie elsewhere now."""
        self.held = {row: made for one in kept for row, made in one.get("held", {}).items()}
        counts = next((one["even"] for one in kept if "even" in one), (0, 0, 0, False))
        self.writing, self.even, self.stretch, self.told = counts

    def noticed(self, step: int, noted: Mapping[str, float], *, last: bool) -> list[str]:
        """That rewards told no answer from another: advantages are then zero, and nothing is learned from them."""
        told = list[str]()
        if "even" in noted:
            self.writing += 1
            self.stretch = self.stretch + 1 if noted["even"] == 1.0 else 0
            self.even += bool(self.stretch)
            if self.stretch == _STRETCH and not self.told:
                self.told = True
                told.append(
                    f"in the {_STRETCH} steps up to step {step} all answers to a prompt got the same reward "
                    f"({noted['reward']:g} on average), so that nothing was learned from them; {_CURE}"
                )
        if last and 2 * self.even > self.writing:
            rest = "the model has learned nothing from rewards" if self.even == self.writing else "they taught nothing"
            told.append(
                f"in {self.even} of {self.writing} steps all answers to a prompt got the same reward, so that none was "
                f"better than another: {rest}; {_CURE}"
            )
        return told

    @property
    def untaught(self) -> str:
        """That no reward so far has told one answer to a prompt from another."""
        if not self.even or self.even < self.writing:
            return ""
        return f"in all {self.writing} steps so far all answers to a prompt got the same reward"

    def _drawn(
        self, model: Any, prompts: list[list[int]], seeds: Sequence[Sequence[Any]], device: torch.device
    ) -> list[list[int]]:  # fmt: skip
        """The tokens of an answer to each prompt; the numbers that draw it follow from the seeds of its own."""
        chances = torch.stack([_chances((*seed, prompt), self.options.max_new_tokens)
                               for seed, prompt in zip(seeds, prompts, strict=True)])  # fmt: skip
        ids, mask = left_padded([torch.tensor(prompt, device=device) for prompt in prompts], self.tokenizer.pad_token_id)
        return drawn(
            model, ids, mask, chances, temperature=self.options.temperature, ends=self.ends(model),
            pad=self.tokenizer.pad_token_id,
        )  # fmt: skip

    def _written(self, model: Any, batch: Batch) -> Written:
        """The answers to the prompts of a batch, `group` to each, with their advantages; known ones where there are some."""
        group, prompts = self.options.group, _unpadded(batch)
        numbers = batch["number"].tolist()
        new = [i for i, number in enumerate(numbers) if number not in self.held]
        made: dict[int, dict[str, Any]] = {}
        if new:
            seeds = [(torch.initial_seed(), self.step, numbers[i], k) for i in new for k in range(group)]
            answers = self._drawn(model, [prompts[i] for i in new for _ in range(group)], seeds, batch["input_ids"].device)
            texts = [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]
            told = self._told(batch)
            rewards = self.rewards([told[i] for i in new for _ in range(group)], texts, batch["input_ids"].device)
            ends = set(self.ends(model))
            self.note(
                reward=_numbers(rewards, batch), length=_numbers([len(a) for a in answers], batch),
                ended=_numbers([a[-1] in ends for a in answers], batch),
            )  # fmt: skip
            even = list[bool]()
            for place, i in enumerate(new):
                own = slice(place * group, (place + 1) * group)
                values = np.asarray(rewards[own])
                even.append(bool(values.max() == values.min()))
                # exactly zero where all are equal: Adam makes a step even of rounding
                apart = np.zeros(group) if even[-1] else (values - values.mean()) / (values.std() + _LEAST)
                made[numbers[i]] = {"answers": answers[own], "advantages": apart.tolist(), "before": None}
            self.note(even=_numbers(even, batch))
        rows = [self.held.get(number) or made[number] for number in numbers]
        if self.options.updates > 1:
            self.held |= made
        known = all(row["before"] is not None for row in rows)
        return Written(
            [prompt for prompt in prompts for _ in range(group)], [a for row in rows for a in row["answers"]],
            [a for row in rows for a in row["advantages"]],
            [b for row in rows for b in row["before"]] if known else None,
        )  # fmt: skip

    def _stand_in(self, batch: Batch) -> Written:
        """Answers of the greatest length, for a plan."""
        count = len(batch["answer_at"]) * self.options.group
        prompt, answer = [0] * batch["input_ids"].shape[1], [0] * self.options.max_new_tokens
        return Written([prompt] * count, [answer] * count, [0.0] * count)

    def _as_batch(self, prompts: list[list[int]], answers: list[list[int]], like: torch.Tensor) -> Batch:
        """Prompts with their answers `[answers, tokens]`; labels at the tokens of the answers."""
        whole = [{"input_ids": [*p, *a]} for p, a in zip(prompts, answers, strict=True)]
        made = pad_right(whole, self.tokenizer.pad_token_id)
        made["labels"] = padded([[*[IGNORED] * len(p), *a] for p, a in zip(prompts, answers, strict=True)], IGNORED)
        return {key: like.new_zeros(value.shape) if not has_values(like) else value.to(like.device)
                for key, value in made.items()}  # fmt: skip

    # --- loss

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """The loss of each answer, summed."""
        real = has_values(batch["input_ids"])
        written = self._written(model, batch) if real else self._stand_in(batch)
        rows = self._as_batch(written.prompts, written.answers, batch["input_ids"])
        aim = self.aim(rows)
        inputs, temperature = self.inputs(rows), self.options.temperature
        known = None
        if self.options.beta:
            with reference(model):
                known = -target_losses(model, inputs, aim, temperature=temperature)
        own = -target_losses(model, inputs, aim, temperature=temperature)
        if written.before is None:
            before = own.detach()
            if real and self.options.updates > 1:
                self._remember(batch, before, [len(a) for a in written.answers])
        else:
            before = own.new_tensor([value for values in written.before for value in values])
        advantages = own.new_tensor(written.advantages)[aim.rows]
        ratio = torch.exp(own - before)
        low, high = 1.0 - self.options.clip, 1.0 + self.options.clip
        losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        self.note(clipped=((ratio < low) | (ratio > high)).float())
        if known is not None:
            apart = known - own
            divergence = torch.exp(apart) - apart - 1.0
            self.note(kl=divergence)
            losses = losses + self.options.beta * divergence
        count = len(rows["input_ids"])
        lengths = losses.new_zeros(count).index_add(0, aim.rows, torch.ones_like(losses))
        return (losses.new_zeros(count).index_add(0, aim.rows, losses) / lengths).sum()

    def _remember(self, batch: Batch, before: torch.Tensor, lengths: list[int]) -> None:
        """Log-probabilities of answers that are learned from again."""
        values = [part.tolist() for part in before.cpu().split(lengths)]
        group = self.options.group
        for i, number in enumerate(batch["number"].tolist()):
            self.held[number]["before"] = values[i * group : (i + 1) * group]

    # --- answers

    @torch.no_grad()
    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """An answer to each prompt, with its reward where the batch says what a reward is told."""
        if not has_values(batch["input_ids"]):
            written = self._stand_in(batch)
            count = len(batch["answer_at"])
            rows = self._as_batch(written.prompts[:count], written.answers[:count], batch["input_ids"])
            divergences(model, self.inputs(rows), self.aim(rows), partial(reference, model))
            return []
        prompts = _unpadded(batch)
        answers = self._drawn(model, prompts, [("figures",)] * len(prompts), batch["input_ids"].device)
        ends = set(self.ends(model))
        made = [Story(self.tokenizer.decode(a, skip_special_tokens=True).strip(), len(a), ended=a[-1] in ends)
                for a in answers]  # fmt: skip
        if "told" in batch:
            far = self._strayed(model, prompts, answers, batch) if has_reference(model) else [None] * len(prompts)
            rewards = self.rewards(self._told(batch), [story.text for story in made], batch["input_ids"].device)
            for story, reward, divergence in zip(made, rewards, far, strict=True):
                story.reward, story.divergence = reward, divergence
        return made

    def _strayed(
        self, model: Any, prompts: list[list[int]], answers: list[list[int]], batch: Batch
    ) -> list[float | None]:  # fmt: skip
        """The divergence from the reference, summed over the tokens of each answer."""
        rows = self._as_batch(prompts, answers, batch["input_ids"])
        aim = self.aim(rows)
        _, _, apart = divergences(model, self.inputs(rows), aim, partial(reference, model))
        return apart.new_zeros(len(prompts)).index_add(0, aim.rows, apart).tolist()  # type: ignore[no-any-return]

    def final_answers(self, model: Any, batch: Batch) -> list[Any]:
        """As `answers`."""
        return self.answers(model, batch)

    def join(self, answers: Sequence[Any], rows: Rows) -> list[Any]:
        """A feature is an example."""
        return list(answers)

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """The mean reward with its 95 % interval, the divergence from the reference per token, how many answers end before
        they must, their mean length in tokens; the loss is what is made small: beta times the divergence less the reward."""
        rewards = np.asarray([story.reward for story in answers], dtype=float)
        mean = float(rewards.mean())
        spread = 1.96 * float(rewards.std(ddof=1)) / len(rewards) ** 0.5 if len(rewards) > 1 else 0.0
        apart = [s.divergence for s in answers]
        far = None if None in apart else sum(apart) / max(1, sum(s.tokens for s in answers))
        return {
            "rows": len(examples),
            "reward": mean,
            "reward_interval": [mean - spread, mean + spread],
            "kl": far,
            "ended": float(np.mean([story.ended for story in answers])),
            "length": float(np.mean([story.tokens for story in answers])),
            "loss": None if far is None else self.options.beta * far - mean,
        }

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """The base itself is the one, and is measured by the run."""
        return {}

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The text, and its reward."""
        return {"answer": answer.text, **({} if answer.reward is None else {"reward": f"{answer.reward:.6g}"})}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """The text."""
        return {"answer": answer.text}

    @torch.no_grad()
    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """The probability of each token of the prompts but the first, in order."""
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        rows = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        return torch.exp(-target_losses(model, self.inputs(rows), self.aim(rows))).double()


def _unpadded(batch: Batch) -> list[list[int]]:
    lengths = batch["attention_mask"].sum(1).tolist()
    return [ids[:length] for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]


def _numbers(values: Sequence[Any], batch: Batch) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], device=batch["input_ids"].device)


def _chances(seeds: Sequence[Any], count: int) -> torch.Tensor:
    """Numbers from 0 to 1 `[count]` that follow from the seeds."""
    digest = hashlib.blake2b(repr(tuple(seeds)).encode(), digest_size=8).digest()
    return torch.rand(count, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1))
