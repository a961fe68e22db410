"""T9: an unknown adapter name in a mixed batch gives the base's output elsewhere."""

import pytest
import torch
from trap_models import ids, llama, logits, stir

from afina import LoraConfig, get_peft_model
from afina.errors import AdapterNameError


@pytest.fixture
def model():
    made = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]), adapter_name="english")
    made.add_adapter("french", LoraConfig(r=5, target_modules=["k_proj", "o_proj"]))
    return stir(stir(made, "english"), "french", seed=4)


def run(model, names, batch):
    with torch.no_grad():
        return model(input_ids=batch, adapter_names=names).logits


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_t09_an_unknown_name_is_an_error(model, call):
    batch = ids(3)
    arguments = {"input_ids": batch, "adapter_names": ["english", "frensh", "__base__"]}
    with pytest.raises(AdapterNameError) as error:
        getattr(model, call)(**arguments)
    assert "'frensh'" in str(error.value)
    assert "Did you mean 'french'" in str(error.value)
    # the failed call leaves nothing behind
    before = logits(model, input_ids=batch)
    torch.testing.assert_close(run(model, None, batch), before, rtol=0, atol=0)


def test_t09_all_unknown_names_are_told(model):
    with pytest.raises(AdapterNameError) as error:
        run(model, ["a", "b", "english"], ids(3))
    assert "'a'" in str(error.value)
    assert "'b'" in str(error.value)


@pytest.mark.parametrize("names", [["english"], ["english"] * 4, []])
def test_t09_a_wrong_number_of_names(model, names):
    with pytest.raises(AdapterNameError, match=rf"adapter_names has {len(names)} names, but the batch has 3 rows"):
        run(model, names, ids(3))
    with pytest.raises(AdapterNameError, match="rows"):
        model(ids(3), adapter_names=names)


def test_t09_one_string_is_not_a_list(model):
    with pytest.raises(AdapterNameError, match="in a list"):
        run(model, "english", ids(3))


def test_t09_right_names_give_each_row_its_adapter(model):
    batch = ids(3)
    mixed = run(model, ["french", "__base__", "english"], batch)
    for row, name in enumerate(["french", None, "english"]):
        if name is None:
            with model.disable_adapter():
                alone = logits(model, input_ids=batch[row : row + 1])
        else:
            model.set_adapter(name)
            alone = logits(model, input_ids=batch[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    assert (mixed[0] - logits(model, input_ids=batch)[0]).abs().max() > 1e-3


def test_t09_the_base_may_be_called_after_a_mixed_batch(model):
    """Rows of a past call are not used for another one."""
    run(model, ["french", "__base__", "english"], ids(3))
    with torch.no_grad():
        once = model.get_base_model()(input_ids=ids(2)).logits
    torch.testing.assert_close(once, logits(model, input_ids=ids(2)), rtol=0, atol=0)
