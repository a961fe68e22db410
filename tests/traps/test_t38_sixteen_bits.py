"""T38: 16-bit adapters: "Attempting to unscale FP16 gradients", or NaN. Masters stay float32."""

import pytest
import torch
from trap_models import bert, gpt2, ids, llama, logits, opt, stir, vit

from afina import (
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)

CONFIGS = {
    "lora": LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS"),
    "dora": LoraConfig(r=3, use_dora=True, task_type="SEQ_CLS"),
    "ia3": IA3Config(task_type="SEQ_CLS"),
    "norms": LNTuningConfig(task_type="SEQ_CLS"),
    "biases": BitFitConfig(task_type="SEQ_CLS"),
    "bottleneck": BottleneckConfig(task_type="SEQ_CLS"),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    "tokens": LoraConfig(r=3, trainable_token_indices=[5, 9], task_type="SEQ_CLS"),
}
HALF = [torch.float16, torch.bfloat16]


def masters(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("config", CONFIGS)
def test_t38_everything_that_trains_is_float32(config, dtype):
    """The base is 16 bits wide, its output too, and a scaled backward can be unscaled."""
    model = get_peft_model(bert().to(dtype), CONFIGS[config])
    model.train()
    inputs = {"input_ids": ids(), "labels": torch.tensor([0, 1, 2])}
    assert {p.dtype for p in masters(model)} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    output = model(**inputs)
    assert output.logits.dtype == dtype
    (output.loss.float() * 2.0**7).backward()
    optimizer = torch.optim.SGD(masters(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    scaler.scale(torch.ones(()))  # as after a scaled loss
    scaler.unscale_(optimizer)  # raises for fp16 gradients
    grads = [p.grad for p in masters(model) if p.grad is not None]
    assert grads
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)
    scaler.step(optimizer)
    scaler.update()


def test_t38_the_naive_way_cannot_be_unscaled():
    model = bert().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(input_ids=ids(), labels=torch.tensor([0, 1, 2])).loss * 2.0**7).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="unscale FP16"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize("make", [llama, gpt2, opt, vit])
@pytest.mark.parametrize("dtype", HALF)
def test_t38_small_steps_are_not_lost(make, dtype):
    """A step far below the 16-bit resolution still arrives in the master."""
    model = get_peft_model(make().to(dtype), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    parameter = masters(model)[0]
    before = parameter.detach().clone()
    largest = before.abs().argmax()
    step = before.flatten()[largest] * 1e-5
    with torch.no_grad():
        parameter.add_(step)
    assert parameter.flatten()[largest] != before.flatten()[largest]
    narrow = before.flatten()[largest].to(dtype)
    assert narrow + step.to(dtype) == narrow  # where a 16-bit master would have stood still


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_t38_autocast(base):
    model = stir(get_peft_model(llama().to(base), LoraConfig(r=3, target_modules="all-linear")))
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=ids(), labels=ids())
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in masters(model))
    want = logits(stir(get_peft_model(llama(), LoraConfig(r=3, target_modules="all-linear"))))
    assert float((output.logits.detach().float() - want).norm() / want.norm()) < 0.05


def test_t38_on_request_adapters_take_the_dtype_of_the_base():
    model = get_peft_model(llama().bfloat16(), LoraConfig(r=3), autocast_adapter_dtype=False)
    assert {p.dtype for p in masters(model)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", HALF)
def test_t38_a_saved_adapter_keeps_its_bits(dtype, tmp_path):
    from afina import PeftModel

    model = stir(get_peft_model(llama().to(dtype), LoraConfig(r=3)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().to(dtype), tmp_path, is_trainable=True)
    for name, parameter in loaded.state_dict().items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, model.state_dict()[name])
