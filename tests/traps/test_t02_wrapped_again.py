"""T2: wrapping an adapted model again throws the adapter it carries away."""

import pytest
import torch
from trap_models import llama, logits, stir

from afina import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from afina.core.injection import AdapterSet
from afina.errors import AdapterNameError, AlreadyAdaptedError

CONFIG = LoraConfig(r=3, target_modules=["q_proj", "v_proj"])


def adapted():
    return stir(get_peft_model(llama(), CONFIG))


def injected():
    return inject_adapter_in_model(CONFIG, llama())


def below():
    return adapted().get_base_model()


@pytest.mark.parametrize("make", [adapted, injected, below])
@pytest.mark.parametrize("again", ["get", "load", "construct"])
def test_t02_an_adapted_model_is_not_wrapped_again(make, again, tmp_path):
    stir(get_peft_model(llama(seed=3), CONFIG)).save_pretrained(tmp_path)
    model = make()
    before = logits(model)
    with pytest.raises(AlreadyAdaptedError) as error:
        {
            "get": lambda: get_peft_model(model, CONFIG),
            "load": lambda: PeftModel.from_pretrained(model, tmp_path),
            "construct": lambda: PeftModel(model, CONFIG),
        }[again]()
    text = str(error.value)
    assert "'default'" in text
    assert ("load_adapter(" if again == "load" else "add_adapter(") in text
    assert "unload()" in text
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_t02_the_cures_of_the_message_work(tmp_path):
    stir(get_peft_model(llama(), CONFIG), seed=5).save_pretrained(tmp_path)
    model = adapted()
    before = logits(model)
    model.add_adapter("another_name", CONFIG)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    model.load_adapter(tmp_path, "third")
    model.set_adapter("third")
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(llama(), tmp_path)), rtol=0, atol=0)
    base = model.unload()
    torch.testing.assert_close(logits(base), logits(llama()), rtol=0, atol=0)
    assert AdapterSet.of(base) is None
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path)),
        logits(PeftModel.from_pretrained(llama(), tmp_path)),
        rtol=0,
        atol=0,
    )


def test_t02_a_taken_name_is_refused(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    for add in (lambda: model.add_adapter("default", CONFIG), lambda: model.load_adapter(tmp_path, "default")):
        with pytest.raises(AdapterNameError, match=r"'default' is there already; delete_adapter\('default'\)"):
            add()


def test_t02_injecting_twice_keeps_both():
    model = injected()
    inject_adapter_in_model(CONFIG, model, adapter_name="second")
    adapters = AdapterSet.of(model)
    assert adapters.active == ("default", "second")
    with pytest.raises(AdapterNameError, match="there already"):
        inject_adapter_in_model(CONFIG, model)


def test_t02_nothing_is_left_behind_by_a_prompt_that_was_taken_out():
    from afina import PrefixTuningConfig, PromptTuningConfig

    for config in (PromptTuningConfig, PrefixTuningConfig):
        base = llama()
        before = logits(base)
        first = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=3))
        assert not torch.allclose(logits(first)[:, -7:], before)
        base = first.unload()
        torch.testing.assert_close(logits(base), before, rtol=0, atol=0)
        # and a second prompt on the same base is the one that acts
        torch.manual_seed(7)
        second = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=3))
        torch.manual_seed(7)
        fresh = get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with torch.no_grad():
            fresh.prompt_encoder["default"].table.copy_(second.prompt_encoder["default"].table)
        torch.testing.assert_close(logits(second), logits(fresh), rtol=0, atol=0)


@pytest.mark.parametrize("injected_by_peft", [False, True])
def test_t02_a_model_that_peft_adapted_is_not_wrapped(injected_by_peft, tmp_path):
    import warnings

    import peft

    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(llama(), config)
        theirs.save_pretrained(tmp_path)
    model = theirs.base_model.model if injected_by_peft else theirs
    for again in (lambda: get_peft_model(model, CONFIG), lambda: PeftModel.from_pretrained(model, tmp_path)):
        with pytest.raises(AlreadyAdaptedError, match="made by PEFT") as error:
            again()
        assert "merge_and_unload()" in str(error.value)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(theirs), rtol=1e-5, atol=1e-5)
