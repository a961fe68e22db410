"""LoftQ: factors that make up for what quantisation took from each weight, over a base that stays as it is."""

import json

import pytest
import torch
import transformers as tf

from afina import LoraConfig, PeftModel, get_peft_model
from afina.core.codecs import codec_of
from afina.core.initialise import FloatWeights
from afina.errors import ConfigError
from afina.memory.storage import Storage

LIBRARY = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8_weight_only": "torchao"}


def config(**options):
    return tf.LlamaConfig(
        hidden_size=28, intermediate_size=53, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=14,
        vocab_size=61, initializer_range=0.2, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config()).save_pretrained(path, max_shard_size="20KB")
    assert (path / "model.safetensors.index.json").is_file()
    return path


def loaded(folder, storage, auto=tf.AutoModelForCausalLM):
    pytest.importorskip(LIBRARY.get(storage, "torch"))
    return Storage(storage).load(auto, str(folder))[0]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}, {"r": 97}], ids=["r5", "rslora", "r-above"])
@pytest.mark.parametrize("storage", ["int8", "nf4", "fp4", "int8_weight_only"])
def test_the_weight_is_nearer_than_by_quantisation_alone_and_as_near_as_can_be(storage, options, folder):
    model = loaded(folder, storage)
    stored = {n: codec_of(m).read(m).clone() for n, m in model.named_modules() if "weight" in m._parameters}
    floats = dict(tf.AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    settings = {"r": 5, "target_modules": "all-linear", "init_lora_weights": "loftq", **options}
    model = get_peft_model(model, LoraConfig(**settings))
    assert len(model.adapters.layers) == 14
    for path, layer in model.adapters.layers.items():
        weight, adapter = floats[f"{path}.weight"].detach(), layer.adapters["default"]
        kept = layer.view.weight().float()
        assert torch.equal(kept, stored[path].float())  # the base stays as it is
        left = weight - kept - adapter.delta_weight().detach()
        values = torch.linalg.svdvals(weight - kept)
        best = float(values[settings["r"] :].square().sum().sqrt())
        assert float(left.norm()) == pytest.approx(best, abs=1e-4 * float(weight.norm()))
        assert float(left.norm()) < 0.93 * float((weight - kept).norm())


def test_the_model_answers_nearer_to_the_base_before_quantisation(folder):
    ids = torch.arange(47)[None] % 61
    with torch.no_grad():
        want = tf.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        plain = loaded(folder, "nf4")(ids).logits
        settings = LoraConfig(r=11, target_modules="all-linear", init_lora_weights="loftq")
        begun = get_peft_model(loaded(folder, "nf4"), settings).eval()(ids).logits
    assert float((begun - want).norm()) < 0.8 * float((plain - want).norm())


def test_the_saved_adapter_applies_to_the_base_as_anyone_loads_it(folder, tmp_path):
    model = get_peft_model(
        loaded(folder, "nf4"),
        LoraConfig(r=3, target_modules="all-linear", init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
    )
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True  # else PEFT would change the base again
    assert written["loftq_config"] == {}
    again = PeftModel.from_pretrained(loaded(folder, "nf4"), tmp_path)
    ids = torch.arange(23)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("auto", [tf.AutoModelForSequenceClassification, tf.AutoModel], ids=["head", "no head"])
def test_weights_are_found_under_another_prefix(auto, folder):
    model = loaded(folder, "nf4", auto)
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights="loftq"))
    begun = [layer.adapters["default"] for key, layer in model.adapters.layers.items() if key.endswith("_proj")]
    assert len(begun) == 4
    assert all(adapter.lora_B.abs().sum() > 0 for adapter in begun)


def test_conv1d_layers_are_read_the_other_way_round(tmp_path):
    torch.manual_seed(0)
    made = tf.GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=61, n_positions=31)
    tf.GPT2LMHeadModel(made).save_pretrained(tmp_path)
    model = get_peft_model(loaded(tmp_path, "nf4"), LoraConfig(r=3, target_modules=["c_proj"], init_lora_weights="loftq"))
    floats = dict(tf.AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for path, layer in model.adapters.layers.items():  # one of them square
        weight = floats[f"{path}.weight"].detach().T
        kept = layer.view.weight().float()
        left = weight - kept - layer.adapters["default"].delta_weight().detach()
        assert float(left.norm()) < 0.95 * float((weight - kept).norm())


def test_what_cannot_be_begun_so_is_refused_and_nothing_is_changed(folder, tmp_path):
    settings = {"target_modules": ["q_proj"], "init_lora_weights": "loftq"}
    plain = loaded(folder, "fp32")
    with pytest.raises(ConfigError, match="none of the adapted layers is quantised"):
        get_peft_model(plain, LoraConfig(**settings))
    assert not any(type(m).__name__ == "AdaptedLayer" for m in plain.modules())
    model = loaded(folder, "nf4")
    with pytest.raises(ConfigError, match="loftq_bits=8: the base is stored in 4 bits"):
        get_peft_model(model, LoraConfig(**settings, loftq_config={"loftq_bits": 8}))
    with pytest.raises(ConfigError, match="loftq_iter=5: every further step quantises the base anew"):
        LoraConfig(**settings, loftq_config={"loftq_iter": 5})
    with pytest.raises(ConfigError, match="says nothing without"):
        LoraConfig(loftq_config={"loftq_bits": 4})
    with pytest.raises(ConfigError, match=r"'lotfq_bits' is not known.*Did you mean 'loftq_bits'"):
        LoraConfig(**settings, loftq_config={"lotfq_bits": 4})
    model.name_or_path = str(tmp_path)
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        get_peft_model(model, LoraConfig(**settings))
    other = tmp_path / "other"
    tf.OPTForCausalLM(tf.OPTConfig(hidden_size=24, ffn_dim=29, num_hidden_layers=1, num_attention_heads=2, vocab_size=31,
                                   word_embed_proj_dim=24)).save_pretrained(other)  # fmt: skip
    model.name_or_path = str(other)
    with pytest.raises(ConfigError, match=r"does not hold the weights of model\.layers\.0\.self_attn\.q_proj"):
        get_peft_model(model, LoraConfig(**settings))


def test_a_file_of_peft_that_began_so_is_refused(folder, tmp_path):
    model = get_peft_model(loaded(folder, "fp32"), LoraConfig(r=3, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text()) | {"init_lora_weights": "loftq"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="changed the base it was trained on"):
        PeftModel.from_pretrained(loaded(folder, "fp32"), tmp_path)


def test_one_tensor_at_a_time_is_read(folder):
    model = loaded(folder, "nf4")
    weights = FloatWeights(model, "a test")
    assert len(set(weights.files.values())) > 1
    assert weights.name_of("model.layers.1.mlp.up_proj") == "model.layers.1.mlp.up_proj.weight"
    assert weights.name_of("layers.1.mlp.up_proj") == "model.layers.1.mlp.up_proj.weight"
    assert weights.name_of("model.layers.7.mlp.up_proj") is None
