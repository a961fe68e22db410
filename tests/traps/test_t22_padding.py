"""T22: classifying at the last token, with the padding on the other side."""

import pytest
import torch
import transformers as tf
from trap_models import gpt2, ids, llama, logits, opt, stir

from afina import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

MODELS = {
    "gpt2": lambda: gpt2(tf.GPT2ForSequenceClassification, num_labels=3),
    "llama": lambda: llama(tf.LlamaForSequenceClassification, num_labels=3),
    "opt": lambda: opt(tf.OPTForSequenceClassification, num_labels=3),
}
CONFIGS = {
    "lora": lambda: LoraConfig(r=3, task_type="SEQ_CLS"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
}
LENGTHS = (7, 3, 5)


def batch(side):
    """Rows of different lengths, padded with the model's padding token, and the mask."""
    rows = ids(3, 7)
    tokens, mask = torch.zeros_like(rows), torch.zeros_like(rows)
    for i, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(7 - length, 7)
        tokens[i, place], mask[i, place] = rows[i, :length], 1
    return tokens, mask


def alone(model):
    rows = ids(3, 7)
    return torch.cat([logits(model, input_ids=rows[i : i + 1, :n], attention_mask=torch.ones(1, n, dtype=torch.long))
                      for i, n in enumerate(LENGTHS)])  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*will not detect padding")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_t22_padding_on_either_side_changes_nothing(name, config, side):
    model = stir(get_peft_model(MODELS[name](), CONFIGS[config]()), scale=1.0)
    tokens, mask = batch(side)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if name == "gpt2" and config == "lora" and side == "left":  # the base itself counts positions from the padding
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    want = alone(model)
    torch.testing.assert_close(logits(model, **inputs), want, rtol=1e-4, atol=1e-5)
    assert (want[0] - want[1]).abs().max() > 1e-3
    # the wrong end of a row is another answer
    if side == "right":
        whole = logits(model, input_ids=tokens, attention_mask=torch.ones_like(mask))
        assert config not in ("prompt", "p-tuning") or not torch.allclose(whole[1], want[1], atol=1e-4)


@pytest.mark.parametrize("config", ["lora", "prefix", "prompt", "p-tuning"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_t22_padding_is_found_without_a_mask(name, config):
    """The base finds the last token by the padding's id; virtual tokens take the ids away."""
    model = stir(get_peft_model(MODELS[name](), CONFIGS[config]()), scale=1.0)
    tokens, _ = batch("right")
    torch.testing.assert_close(logits(model, input_ids=tokens), alone(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_t22_gradients_do_not_depend_on_the_side(name, config):
    grads = []
    for side in ("right", "left"):
        model = stir(get_peft_model(MODELS[name](), CONFIGS[config]()), scale=0.5)
        if config == "p-tuning":
            torch.manual_seed(0)
            for parameter in model.prompt_encoder.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        tokens, mask = batch(side)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if name == "gpt2" and config == "lora" and side == "left":
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        for p in model.parameters():
            p.grad = None
        if config == "lora":
            torch.manual_seed(1)
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.copy_(torch.randn(p.shape) * 0.2)
        else:
            torch.manual_seed(1)
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.copy_(torch.randn(p.shape) * 0.5)
        model(**inputs, labels=torch.tensor([0, 2, 1])).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-3, atol=1e-5, msg=key)
