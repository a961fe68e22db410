"""T5: a newly initialised head that is not saved comes back random. Whatever its name, it is trained and saved."""

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from trap_models import bert, gpt2, llama, logits, reload, stir, trainable

from afina import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from afina.errors import CheckpointError, TargetError


class OddModel(tf.BertPreTrainedModel):
    """A head under names nobody expects: modules, a norm, a bare parameter of a module."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = tf.BertModel(config, add_pooling_layer=False)
        self.verdict = nn.Sequential(nn.Linear(24, 11), nn.Tanh(), nn.Linear(11, 3))
        self.calm = nn.LayerNorm(24)
        self.gain = Gain()
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        h = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return tf.modeling_outputs.SequenceClassifierOutput(logits=self.verdict(self.gain(self.calm(h))))


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.amount = nn.Parameter(torch.rand(24))

    def forward(self, x):
        return x * self.amount


class RootModel(OddModel):
    """A new parameter that belongs to the model itself."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.ones(3))
        self.post_init()


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of the body alone."""
    bert(tf.BertModel, seed=4).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fresh(folder, cls=tf.BertForSequenceClassification, seed=0):
    torch.manual_seed(seed)  # another random head each time
    model = cls.from_pretrained(folder, num_labels=3).eval()
    if hasattr(model, "gain"):
        nn.init.normal_(model.gain.amount)
    return model


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["query", "value"]),
        IA3Config(target_modules=["key"], feedforward_modules=[]),
        LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    ],
    ids=lambda c: f"{type(c).__name__}-{c.task_type}",
)
def test_t05_a_new_head_is_the_same_after_reload(config, folder, tmp_path):
    assert not torch.equal(fresh(folder, seed=0).classifier.weight, fresh(folder, seed=1).classifier.weight)
    model = stir(get_peft_model(fresh(folder, seed=0), config))
    assert any("classifier" in name for name in trainable(model))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh(folder, seed=1), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"], ids=str)
def test_t05_heads_under_any_name(targets, folder, tmp_path):
    base = fresh(folder, OddModel)
    model = stir(get_peft_model(base, LoraConfig(r=2, target_modules=targets)))
    assert model.peft_config["default"].modules_to_save == ["verdict", "calm", "gain"]
    names = trainable(model)
    for part in ("verdict", "calm", "gain"):
        assert any(f".{part}.adapters." in n for n in names), part
    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {"base_model.model.verdict.0.weight", "base_model.model.calm.bias", "base_model.model.gain.amount"} <= set(keys)
    again = fresh(folder, OddModel, seed=9)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    # the naive way: only the factors are kept, the head is another
    state = {k: v for k, v in keys.items() if "lora" in k}
    assert len(state) < len(keys)


def test_t05_a_pooler_missing_in_the_checkpoint(tmp_path):
    tf.BertModel(bert().config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    base = fresh(tmp_path / "base")
    model = stir(get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")))
    assert set(model.peft_config["default"].modules_to_save) == {"bert.pooler", "classifier"}
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh(tmp_path / "base", seed=8), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_t05_part_of_a_module_is_new(folder, tmp_path):
    """A bias that the checkpoint lacks, in a layer whose weight it has."""
    state = load_file(folder / "model.safetensors")
    from safetensors.torch import save_file

    lost = "encoder.layer.1.output.dense.bias"
    save_file({k: v for k, v in state.items() if k != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    base = fresh(folder)
    with torch.no_grad():
        base.bert.encoder.layer[1].output.dense.bias.normal_()  # "newly initialised"
    model = stir(get_peft_model(base, LoraConfig(r=2, target_modules=["query"])))
    assert "bert.encoder.layer.1.output.dense" in model.peft_config["default"].modules_to_save
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh(folder, seed=5), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_t05_a_new_parameter_of_the_model_itself_is_refused(folder):
    with pytest.raises(TargetError, match="temperature") as error:
        get_peft_model(fresh(folder, RootModel), LoraConfig(r=2, target_modules=["query"]))
    assert "save" in str(error.value)


def test_t05_a_replaced_head_counts_as_new(tmp_path):
    base = reload(tmp_path / "base", bert(seed=4))
    assert trainable(get_peft_model(base, LoraConfig(r=2, target_modules=["query"])))
    base = reload(tmp_path / "base", bert(seed=4))
    base.classifier = nn.Linear(24, 3)
    model = stir(get_peft_model(base, LoraConfig(r=2, target_modules=["query"])))
    assert model.peft_config["default"].modules_to_save == ["classifier"]


def test_t05_what_was_loaded_is_not_taken_for_new(tmp_path):
    """Complete checkpoints, models made from a configuration, resized vocabularies, 16-bit copies: nothing is added."""
    config = LoraConfig(r=2, target_modules=["q_proj"])
    base = reload(tmp_path / "llama", llama())
    assert get_peft_model(base, config).peft_config["default"].modules_to_save is None
    assert get_peft_model(llama(), config).peft_config["default"].modules_to_save is None
    for tied in (False, True):
        base = reload(tmp_path / f"resized{tied}", llama(tie_word_embeddings=tied))
        base.resize_token_embeddings(101)
        assert get_peft_model(base.to(torch.bfloat16), config).peft_config["default"].modules_to_save is None
    base = reload(tmp_path / "gpt2", gpt2())
    assert get_peft_model(base, LoraConfig(r=2)).peft_config["default"].modules_to_save is None


@pytest.mark.parametrize("bits", [8, 4])
def test_t05_a_quantised_base_is_not_taken_for_new(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path)
    quantisation = tf.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, device_map="cpu")
    assert "Linear" in type(base.model.layers[0].self_attn.q_proj).__name__
    assert type(base.model.layers[0].self_attn.q_proj) is not nn.Linear
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.peft_config["default"].modules_to_save is None
    assert len(trainable(model)) == 4


def test_t05_a_second_adapter_saves_its_head_too(folder, tmp_path):
    config = LoraConfig(r=2, target_modules=["query", "value"])
    model = get_peft_model(fresh(folder), config)
    model.add_adapter("second", config)
    assert model.peft_config["second"].modules_to_save == ["classifier"]
    stir(model, "second")
    model.set_adapter("second")
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh(folder, seed=1), tmp_path / "adapter" / "second")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_t05_a_head_that_no_file_holds_is_an_error(folder, tmp_path):
    """An adapter of PEFT without a task type leaves the head out."""
    import warnings

    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(fresh(folder), peft.LoraConfig(r=2, target_modules=["query"]))
        theirs.save_pretrained(tmp_path / "adapter")
        one, two = (peft.PeftModel.from_pretrained(fresh(folder, seed=s), tmp_path / "adapter") for s in (1, 2))
    assert not torch.allclose(logits(one), logits(two))  # the naive way: at random, in silence
    with pytest.raises(CheckpointError, match="classifier") as error:
        PeftModel.from_pretrained(fresh(folder, seed=1), tmp_path / "adapter")
    assert "random" in str(error.value)
    assert "strict=False" in str(error.value)
    assert PeftModel.from_pretrained(fresh(folder, seed=1), tmp_path / "adapter", strict=False)
    whole = bert(seed=4)
    whole.save_pretrained(tmp_path / "whole")
    whole = tf.BertForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert PeftModel.from_pretrained(whole, tmp_path / "adapter")


def test_t05_what_was_merged_is_not_taken_for_new(folder, tmp_path):
    config = LoraConfig(r=2, target_modules=["query", "value"])
    first = stir(get_peft_model(fresh(folder), config)).merge_and_unload()
    second = get_peft_model(first, config)
    assert second.peft_config["default"].modules_to_save is None
    assert len(trainable(second)) == 8
