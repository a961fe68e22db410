"""TRL's trainers train a model that afina has adapted, and our loss of pairs is theirs.

They are given the adapted base model (`model.get_base_model()`), in which nothing but the adapters takes gradients; DPO and
KTO compute what the reference makes of the rows before the first step, when the adapter still changes nothing.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import every_task
import tiny_bases

from afina import LoraConfig, get_peft_model
from afina.tasks.preferences import make_pair

pytest.importorskip("trl", reason="trl is not installed: pip install 'afina[test]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return every_task.save_causal(tmp_path_factory.mktemp("trl"))


def adapted(base, auto=tf.AutoModelForCausalLM, *, identity=True, **settings):
    torch.manual_seed(0)
    model = auto.from_pretrained(base, **settings)
    kind = "SEQ_CLS" if settings else "CAUSAL_LM"
    config = LoraConfig(r=3, target_modules=["c_attn", "c_fc"], task_type=kind, init_lora_weights=identity)
    return get_peft_model(model, config)


def tokenizer_of(base):
    made = tf.AutoTokenizer.from_pretrained(base)
    made.pad_token = made.eos_token
    return made


def pairs(count=8):
    chance = random.Random(0)
    text = lambda: " ".join(chance.choices(tiny_bases.WORDS, k=chance.randrange(2, 7)))
    return [{"prompt": text() + " ", "chosen": text(), "rejected": text()} for _ in range(count)]


def settings(folder, **more):
    return {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [],
            "learning_rate": 1e-2, "save_strategy": "no", "bf16": False, "logging_steps": 1, "disable_tqdm": True,
            **more}  # fmt: skip


def check_trains(trainer, model):
    """The adapter moves, the base does not, and what is saved is the adapter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed
    assert changed <= trained
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in trainer.state.log_history if "loss" in line)


def test_dpo_trains_and_its_loss_is_ours(base, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows, tokenizer = pairs(), tokenizer_of(base)
    options = settings(tmp_path, precompute_ref_log_probs=True, gradient_checkpointing=False, beta=0.3)
    model = adapted(base)
    trainer = DPOTrainer(
        model.get_base_model(), args=DPOConfig(**options), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    assert trainer.ref_model is None  # one copy of the weights
    check_trains(trainer, model)

    policy = adapted(base, identity=False)
    other = DPOTrainer(
        policy.get_base_model(), ref_model=tf.AutoModelForCausalLM.from_pretrained(base),
        args=DPOConfig(**{**options, "precompute_ref_log_probs": False}), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(other.get_train_dataloader()))
    theirs = other.compute_loss(other.model, batch)
    from afina.tasks.dpo import DPO, DPOOptions

    task = DPO(tokenizer_of(base), DPOOptions(beta=0.3), {"form": "answers"})
    features = []
    chosen, rejected = batch["input_ids"].chunk(2)
    masks = batch["completion_mask"].chunk(2)
    seen = batch["attention_mask"].chunk(2)
    for i in range(len(chosen)):
        first, second = chosen[i][seen[0][i].bool()].tolist(), rejected[i][seen[1][i].bool()].tolist()
        at = len(first) - int(masks[0][i].sum())
        features.append({"input_ids": first, "pair_ids": second, "answer_at": at, "answered": 1, "row": i})
    ours = task.loss_sum(policy, task.collate(features)) / len(features)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-6)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for one, two in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
    assert make_pair({"text": "a", "text_pair": "b", "label": "c"}, 1).value.answers == ("b", "c")


def test_the_ranker_trains(base, tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    tokenizer = tokenizer_of(base)
    model = adapted(base, tf.AutoModelForSequenceClassification, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    options = settings(tmp_path, gradient_checkpointing=False)
    trainer = RewardTrainer(
        model.get_base_model(), args=RewardConfig(**options), train_dataset=Dataset.from_list(pairs()),
        processing_class=tokenizer,
    )  # fmt: skip
    check_trains(trainer, model)


def test_kto_trains(base, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(pairs())]
    model = adapted(base)
    options = settings(tmp_path, precompute_ref_log_probs=True, gradient_checkpointing=False)
    trainer = KTOTrainer(
        model.get_base_model(), args=KTOConfig(**options), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(base),
    )  # fmt: skip
    check_trains(trainer, model)


def test_grpo_trains(base, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **_):
        return [float(len(set(text.split()))) for text in completions]

    model = adapted(base)
    options = settings(
        tmp_path, num_generations=4, max_completion_length=5, beta=0.0, gradient_checkpointing=False, temperature=1.3
    )
    trainer = GRPOTrainer(
        model.get_base_model(), reward_funcs=reward, args=GRPOConfig(**options),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in pairs()]), processing_class=tokenizer_of(base),
    )  # fmt: skip
    check_trains(trainer, model)


def test_orpo_trains(base, tmp_path):
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model = adapted(base)
    trainer = ORPOTrainer(
        model.get_base_model(), args=ORPOConfig(**settings(tmp_path, gradient_checkpointing=False, max_length=61)),
        train_dataset=Dataset.from_list(pairs()), processing_class=tokenizer_of(base),
    )  # fmt: skip
    check_trains(trainer, model)
