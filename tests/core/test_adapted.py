"""The wrapper around a layer, seen from the model's own code."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

import afina
from afina.errors import ConfigError


class Odd(nn.Module):
    """A model that asks its layers for attributes, calls them by keyword and tests them for truth."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.inner
        h = self.inner(input=x)
        return nn.functional.linear(h, self.head.weight, self.head.bias) if self.head.out_features == 3 else h


def test_a_layer_called_by_keyword_is_adapted() -> None:
    model, x = Odd(), torch.randn(2, 5)
    before = model(x)
    adapted = afina.get_peft_model(model, afina.LoraConfig(target_modules=["inner"], init_lora_weights=False))
    assert not torch.allclose(adapted(x), before)


def test_attributes_are_those_of_the_module_that_acts() -> None:
    model, x = Odd(), torch.randn(2, 5)
    before = model(x)
    adapted = afina.get_peft_model(model, afina.LoraConfig(target_modules=["inner"], modules_to_save=["head"]))
    assert torch.equal(adapted(x), before)
    with torch.no_grad():
        next(adapted.adapters.adapters("default"))
        for name, parameter in adapted.named_parameters():
            if ".inner." in name and "head" in name:
                parameter.add_(1.0)
    assert not torch.allclose(adapted(x), before)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), before)


def test_hooks_on_the_base_layer_still_run() -> None:
    model, x, seen = Odd(), torch.randn(2, 5), []
    afina.get_peft_model(model, afina.LoraConfig(target_modules=["inner"]))
    model.inner.base_layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(x)
    assert seen == [(2, 7)]


def test_the_spam_recipe_of_the_book_trains_the_last_block_the_final_norm_and_the_head() -> None:
    config = GPT2Config(num_labels=2, pad_token_id=50256)
    with torch.device("meta"):
        model = GPT2ForSequenceClassification(config)
    adapted = afina.get_peft_model(model, afina.LastLayersConfig(task_type="SEQ_CLS"))
    assert adapted.adapters.injected["default"].saved == ["transformer.h.11", "transformer.ln_f", "score"]
    assert adapted.get_nb_trainable_parameters()[0] == 7_087_872 + 1_536 + 2 * 768


def test_copies_for_data_parallel_are_refused_with_what_to_do_instead() -> None:
    model = afina.get_peft_model(Odd(), afina.LoraConfig(target_modules=["inner"]))
    with pytest.raises(ConfigError, match="one process for each GPU"):
        model._replicate_for_data_parallel()  # what torch.nn.parallel.replicate calls
