"""T14: fused experts are skipped while the log says they are trained: every block is listed as adapted or frozen."""

import re

import pytest
import torch
import transformers as tf
from torch import nn
from trap_models import bert, gpt2, llama, llava, logits, moe, stir, t5, trainable, vit

from afina import (
    BottleneckConfig,
    IA3Config,
    LastLayersConfig,
    LNTuningConfig,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)
from afina.errors import TargetError

LINE = re.compile(r"^(\S+)\s+x(\d+)\s+([\d,]+)\s+(.+)$")


def lines(model):
    """(pattern, modules, values, state) of every line of the report."""
    found = [LINE.match(line) for line in model.adapter_report().splitlines()]
    return [(m[1], int(m[2]), int(m[3].replace(",", "")), m[4]) for m in found if m]


CASES = {
    "moe all-linear": (moe, LoraConfig(target_modules="all-linear")),
    "moe experts": (moe, LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])),
    "moe two parameters": (moe, LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "llama": (llama, LoraConfig()),
    "llama tied": (lambda: llama(tie_word_embeddings=True), LoraConfig(target_modules=["embed_tokens"])),
    "gpt2 bias": (gpt2, LoraConfig(bias="all")),
    "t5": (t5, IA3Config()),
    "bert": (bert, LoraConfig(task_type="SEQ_CLS")),
    "bottleneck": (bert, BottleneckConfig()),
    "norms": (llama, LNTuningConfig()),
    "last layers": (gpt2, LastLayersConfig(num_layers=1)),
    "prompt": (bert, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "vit": (vit, LoraConfig()),
    "vit body": (lambda: vit(tf.ViTModel), LoraConfig()),
    "llava": (llava, LoraConfig()),
    "root parameter": (lambda: Rooted(), LoraConfig(target_modules=["inner"])),
}


class Rooted(nn.Module):
    """A model with a parameter of its own, and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5, 7))
        self.inner = nn.Linear(7, 5)

    def forward(self, x):
        return self.inner(x) + x @ self.scale.T


@pytest.mark.parametrize("case", CASES)
def test_t14_every_parameter_is_listed_exactly_once(case):
    make, config = CASES[case]
    base = make()
    count = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, config)
    assert sum(size for _, _, size, _ in lines(model)) == count
    assert any(state == "frozen" for *_, state in lines(model))
    assert len({(pattern, state) for pattern, _, _, state in lines(model)}) == len(lines(model))


def states(model):
    return {pattern: state for pattern, _, _, state in lines(model)}


def test_t14_experts_that_are_left_out_are_said_to_be_frozen():
    found = states(get_peft_model(moe(), LoraConfig(target_modules="all-linear")))
    assert found["model.layers.*.mlp.experts.gate_up_proj"] == "frozen"
    assert found["model.layers.*.mlp.experts.down_proj"] == "frozen"
    assert "LoRA" in found["model.layers.*.self_attn.q_proj"]
    model = get_peft_model(moe(), LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]))
    found = states(model)
    assert "LoRA" in found["model.layers.*.mlp.experts.gate_up_proj"]
    assert found["model.layers.*.mlp.experts.down_proj"] == "frozen"
    assert sum("experts" in name for name in trainable(model)) == 4


def test_t14_what_is_listed_as_adapted_gets_gradients():
    model = stir(get_peft_model(moe(), LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])))
    model.train()
    ids = torch.arange(3, 60).reshape(3, 19)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (".adapters." in name), name
    with model.disable_adapter():
        before = logits(model, input_ids=ids)
    assert (logits(model, input_ids=ids) - before).abs().max() > 1e-3


def test_t14_a_bottleneck_does_not_train_the_block_it_sits_on():
    found = states(get_peft_model(bert(), BottleneckConfig()))
    assert not any("trained whole" in state for state in found.values())
    found = states(get_peft_model(gpt2(), LastLayersConfig(num_layers=1)))
    assert any("trained whole" in state for state in found.values())


def test_t14_a_newly_initialised_head_is_marked(tmp_path):
    bert(tf.BertModel).save_pretrained(tmp_path)
    model = get_peft_model(tf.BertForSequenceClassification.from_pretrained(tmp_path), LoraConfig(r=2))
    assert "newly initialised" in states(model)["classifier"]
    assert "newly initialised" not in str([s for n, s in states(model).items() if n != "classifier"])


@pytest.mark.parametrize("name", ["gate_up_proj", "experts.down_proj", "gate_proj", "up_proj"])
def test_t14_names_of_fused_experts_are_not_passed_over(name):
    with pytest.raises(TargetError) as error:
        get_peft_model(moe(), LoraConfig(target_modules=["q_proj", name]))
    text = str(error.value)
    assert f"'{name}'" in text
    assert "target_parameters=" in text
    assert "experts.gate_up_proj" in text or "experts.down_proj" in text


def test_t14_parameters_that_match_nothing_name_the_nearest():
    with pytest.raises(TargetError) as error:
        get_peft_model(moe(), LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_porj"]))
    assert "target_parameters entry 'experts.gate_up_porj'" in str(error.value)
    assert "gate_up_proj" in str(error.value).split("Did you mean")[1]
