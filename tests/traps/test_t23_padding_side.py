"""T23: padding on the right to train, on the left to write, whatever the tokenizer says."""

from __future__ import annotations

import pytest
import torch
from language_bases import CAUSAL, features_of, save, task_of

from afina.training.models import ModelSource, load_tokenizer

ROWS = [{"text": "Why?", "label": "No."}, {"text": "Name seven fruits that are red.", "label": "the quick brown fox"}]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", CAUSAL)
@torch.no_grad()
def test_t23_the_tokenizers_padding_side_changes_nothing(architecture, side, tmp_path):
    base = str(save(tmp_path / "base", architecture))
    tokenizer = load_tokenizer(ModelSource(base, base, base))
    tokenizer.padding_side = side
    task = task_of("causal_lm", tokenizer, ROWS, max_new_tokens=7)
    model = task.load_model(base).eval()
    features = features_of(task, ROWS).features
    batch = task.collate(features)
    assert batch["attention_mask"][0, 0] == 1
    assert batch["attention_mask"][0, -1] == 0
    alone = sum(task.loss_sum(model, task.collate([feature])) for feature in features)
    torch.testing.assert_close(task.loss_sum(model, batch), alone, rtol=1e-5, atol=1e-4)
    questions = features_of(task, [{"text": row["text"]} for row in ROWS]).features
    asked = task.collate(questions)
    ids, mask, _ = task.questions(model, asked)
    assert mask[0, 0] == 0
    assert mask[:, -1].tolist() == [1, 1]
    assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == [q["input_ids"] for q in questions]
    together = [a.text for a in task.final_answers(model, asked)]
    assert together == [task.final_answers(model, task.collate([question]))[0].text for question in questions]
