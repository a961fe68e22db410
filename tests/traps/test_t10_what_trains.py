"""T10: two adapters are there and only one trains, or another than was meant."""

import pytest
import torch
from trap_models import bert, ids, llama, logits, stir, trainable

from afina import LoraConfig, PeftModel, get_peft_model
from afina.errors import AdapterNameError

CONFIG = LoraConfig(r=3, target_modules=["q_proj", "v_proj"])


def trained(model):
    """Names of the adapters whose parameters take gradients, all or nothing; the base takes none."""
    names = set()
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            adapter = name.split(".adapters.")[1].split(".")[0]
            names |= {adapter} if parameter.requires_grad else set()
        else:
            assert not parameter.requires_grad, name
    for name in names:
        assert all(p.requires_grad for a in model.adapters.adapters(name) for p in a.parameters())
    return sorted(names)


def test_t10_after_every_call_it_is_known_what_trains(tmp_path):
    model = get_peft_model(llama(), CONFIG, adapter_name="a")
    assert trained(model) == ["a"]
    model.add_adapter("b", CONFIG)
    assert trained(model) == ["a"]
    model.set_adapter("b")
    assert trained(model) == ["b"]
    model.set_adapter(["a", "b"])
    assert trained(model) == ["a", "b"]
    assert model.active_adapters == ["a", "b"]
    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        model.load_adapter(tmp_path / "b", "c", is_trainable=is_trainable)
        assert trained(model) == ["a", "b"]  # loaded, not active
        model.delete_adapter("c")
        assert trained(model) == ["a", "b"]
    model.delete_adapter("a")
    assert (trained(model), model.active_adapters) == (["b"], ["b"])
    model.add_adapter("d", CONFIG)
    model.delete_adapter("b")  # the only active one: the first that is left takes its place, and trains as it did
    assert (trained(model), model.active_adapters) == (["d"], ["d"])
    model.merge_adapter()
    model.unmerge_adapter()
    assert trained(model) == ["d"]
    with model.disable_adapter():
        logits(model)
    assert trained(model) == ["d"]
    model.set_adapter("d", inference_mode=True)
    assert trained(model) == []


def test_t10_a_model_loaded_for_inference_stays_so(tmp_path):
    get_peft_model(llama(), CONFIG).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    assert trained(model) == []
    model.load_adapter(tmp_path, "b")
    model.delete_adapter("b")
    assert trained(model) == []
    model.load_adapter(tmp_path, "b")
    model.delete_adapter("default")
    assert (trained(model), model.active_adapters) == ([], ["b"])
    assert trained(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)) == ["default"]


def test_t10_both_of_two_active_adapters_learn():
    model = get_peft_model(llama(), CONFIG, adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["o_proj"]))
    model.set_adapter(["a", "b"])
    model.train()
    stir(stir(model, "a"), "b")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." in n}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_t10_heads_train_with_their_adapter():
    model = get_peft_model(bert(), LoraConfig(r=2, task_type="SEQ_CLS"), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, task_type="SEQ_CLS"))
    assert {n.split(".adapters.")[1].split(".")[0] for n in trainable(model) if "classifier" in n} == {"a"}
    model.set_adapter("b")
    assert {n.split(".adapters.")[1].split(".")[0] for n in trainable(model) if "classifier" in n} == {"b"}


def test_t10_wrong_names_are_errors():
    model = get_peft_model(llama(), CONFIG, adapter_name="english")
    for wrong in (lambda: model.set_adapter("englsh"), lambda: model.delete_adapter("englsh"),
                  lambda: model.set_adapter(["english", "englsh"]), lambda: model.merge_adapter(["englsh"])):  # fmt: skip
        with pytest.raises(AdapterNameError, match="Did you mean 'english'"):
            wrong()
    assert trained(model) == ["english"]


def test_t10_an_adapter_does_not_act_twice():
    model = stir(get_peft_model(llama(), CONFIG))
    before = logits(model)
    for wrong in (lambda: model.set_adapter(["default", "default"]), lambda: model.merge_adapter(["default", "default"])):
        with pytest.raises(AdapterNameError, match="twice"):
            wrong()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("is_trainable", [True, False])
def test_t10_an_error_changes_nothing_of_what_trains(is_trainable, tmp_path):
    get_peft_model(llama(), CONFIG).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=is_trainable)
    before = trained(model)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="broken"):
        model.load_adapter(tmp_path, "b")
    assert trained(model) == before


def test_t10_no_adapter_is_not_made_active():
    model = get_peft_model(llama(), CONFIG)
    with pytest.raises(AdapterNameError, match="disable_adapter"):
        model.set_adapter([])
    assert trained(model) == ["default"]
    model.delete_adapter("default")
    assert model.active_adapters == []
    with pytest.raises(AdapterNameError, match="no adapter is active"):
        _ = model.active_adapter
    torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=0)
