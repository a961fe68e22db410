"""T37: gradient checkpointing over frozen embeddings: no gradient at all, or the wrong one."""

import warnings

import pytest
import torch
import transformers as tf
from transformers import Trainer, TrainingArguments
from trap_models import bert, gpt2, ids, llama, stir, t5, trainable, vit

from afina import BottleneckConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from afina.errors import ConfigError

MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "vit": vit}
CONFIGS = {
    "lora": lambda: LoraConfig(r=3),
    "lora on all": lambda: LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.3),
    "ia3": lambda: IA3Config(),
    "bottleneck": lambda: BottleneckConfig(),
}


def feed(name, rows=4):
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 14, 14, generator=torch.Generator().manual_seed(3)),
                "labels": torch.arange(rows) % 3}  # fmt: skip
    batch = ids(rows, 6)
    return {"input_ids": batch, "labels": torch.arange(rows) % 3 if name == "bert" else batch}


def gradients(model, inputs, before_backward=None, **options):
    model.train()
    model.zero_grad()
    torch.manual_seed(11)
    loss = model(**inputs, **options).loss
    if before_backward is not None:
        before_backward()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(found, wanted):
    assert found.keys() == wanted.keys()
    assert wanted
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-6, msg=key)


def switch_on(model, reentrant, when):
    {
        "adapted": lambda: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant}),
        "base": lambda: model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant}),
    }[when]()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_t37_gradients_are_equal_with_and_without(name, reentrant, config):
    model = stir(get_peft_model(MODELS[name](), CONFIGS[config]()), scale=0.1)
    inputs = feed(name)
    wanted = gradients(model, inputs)
    if name == "vit" and reentrant:
        with pytest.raises(ConfigError, match="use_reentrant=True") as error:
            switch_on(model, reentrant, "adapted")
        assert "leave it out" in str(error.value)
        return
    switch_on(model, reentrant, "adapted")
    compare(gradients(model, inputs), wanted)
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_t37_the_naive_way_gives_no_gradient():
    """Reentrant checkpointing under frozen embeddings, without the library's help."""
    from torch.utils.checkpoint import checkpoint

    layer = get_peft_model(llama(), LoraConfig(r=3)).get_base_model().model.layers[0].self_attn.q_proj
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = checkpoint(layer, torch.randn(2, 20), use_reentrant=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        y.sum().backward()


@pytest.mark.parametrize("when", ["before wrapping", "base"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_t37_it_may_be_switched_on_at_the_base(when, reentrant):
    base = llama()
    if when == "before wrapping":
        base.activation_checkpointing_enable({"use_reentrant": reentrant})
    model = stir(get_peft_model(base, LoraConfig(r=3)))
    if when == "base":
        switch_on(model, reentrant, "base")
    wanted = gradients(stir(get_peft_model(llama(), LoraConfig(r=3))), feed("llama"))
    compare(gradients(model, feed("llama")), wanted)


def test_t37_reentrant_on_pictures_is_refused_before_wrapping_too():
    base = vit()
    base.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant=True"):
        get_peft_model(base, LoraConfig(r=3))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the calls without gradients
@pytest.mark.parametrize("when", ["adapted", "base"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_t37_mixed_batches_and_disabled_adapters_between_forward_and_backward(reentrant, when):
    """The blocks run again in backward, when another call may have changed which adapters act."""

    def make():
        model = get_peft_model(llama(), LoraConfig(r=3), adapter_name="a")
        model.add_adapter("b", LoraConfig(r=5, target_modules=["o_proj", "down_proj"]))
        model.set_adapter(["a", "b"])
        return stir(stir(model, "a"), "b", seed=8)

    rows = ["a", "__base__", "b", "a"]
    plain, checked = make(), make()
    switch_on(checked, reentrant, when)

    def another_call(model):
        def call():
            with torch.no_grad():
                with model.disable_adapter():
                    model(input_ids=ids(2))
                model(input_ids=ids(3), adapter_names=["b", "b", "a"])
                model(input_ids=ids(2))

        return call

    inputs = feed("llama")
    for options in ({"adapter_names": rows}, {}):
        wanted = gradients(plain, inputs, **options)
        compare(gradients(checked, inputs, another_call(checked), **options), wanted)

    def disabled(model):
        model.train()
        model.zero_grad()
        with model.disable_adapter():
            embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
            loss = model(inputs_embeds=embeds, labels=inputs["labels"]).loss
        loss.backward()  # outside: the blocks must run again without adapters
        assert all(p.grad is None for p in model.parameters() if p.requires_grad)
        return embeds.grad

    torch.testing.assert_close(disabled(checked), disabled(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
@pytest.mark.parametrize("reentrant", [False, True])
def test_t37_prompts(config, reentrant):
    model = get_peft_model(llama(), config(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    wanted = gradients(model, feed("llama"))
    switch_on(model, reentrant, "adapted")
    compare(gradients(model, feed("llama")), wanted)


class Rows(torch.utils.data.Dataset):
    def __init__(self, name):
        self.inputs = feed(name, 12)

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return {key: value[i] for key, value in self.inputs.items()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_t37_trainer_switches_it_on(name, tmp_path):
    def run(checkpointing):
        torch.manual_seed(5)
        model = get_peft_model(MODELS[name](), LoraConfig(r=3))
        args = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, report_to=[], use_cpu=True,
            logging_steps=1, save_strategy="no", gradient_checkpointing=checkpointing, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=Rows(name))
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    losses = run(True)
    assert losses == pytest.approx(run(False), rel=1e-5)
    assert losses[2] != losses[0]
    assert trainable(get_peft_model(tf.ViTModel(vit().config), LoraConfig()))
