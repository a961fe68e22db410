"""T16: the adapter was trained on another base."""

import json
import logging

import pytest
import torch
import transformers as tf
from trap_models import bert, gpt2, llama, logits, stir

from afina import LoraConfig, PeftModel, get_peft_model
from afina.errors import BaseMismatchError, CheckpointError

WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


@pytest.fixture
def saved(tmp_path):
    model = stir(get_peft_model(llama(**WIDE), LoraConfig(r=3, target_modules=["q_proj", "v_proj"])))
    model.save_pretrained(tmp_path)
    return tmp_path, logits(model)


def test_t16_another_base_of_the_same_shape_is_refused(saved):
    folder, _ = saved
    other = llama(seed=1, **WIDE)
    before = logits(other)
    with pytest.raises(BaseMismatchError) as error:
        PeftModel.from_pretrained(other, folder)
    assert isinstance(error.value, CheckpointError)
    text = str(error.value)
    for part in (str(folder), "another base", "sampled weights differ", "strict=False"):
        assert part in text, part
    torch.testing.assert_close(logits(other), before, rtol=0, atol=0)


def test_t16_on_request_it_is_loaded_with_a_warning(saved, caplog):
    folder, _ = saved
    with caplog.at_level(logging.WARNING, logger="afina"):
        PeftModel.from_pretrained(llama(seed=1, **WIDE), folder, strict=False)
    assert "another base" in caplog.text


def test_t16_the_same_base_loads(saved):
    folder, expected = saved
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(**WIDE), folder)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_t16_the_same_base_in_another_precision_loads(dtype, saved):
    folder, expected = saved
    loaded = PeftModel.from_pretrained(llama(**WIDE).to(dtype), folder)
    torch.testing.assert_close(logits(loaded).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float16])
def test_t16_trained_on_a_16_bit_copy(trained, tmp_path):
    get_peft_model(llama(**WIDE).to(trained), LoraConfig(r=3)).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(llama(**WIDE), tmp_path)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(llama(seed=1, **WIDE), tmp_path)


@pytest.mark.parametrize("bits", [8, 4])
def test_t16_the_same_base_quantised_loads_and_another_does_not(bits, saved, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder, expected = saved
    quantisation = tf.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)

    def quantised(seed):
        llama(seed=seed, **WIDE).save_pretrained(tmp_path / f"base{seed}")
        return tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / f"base{seed}", quantization_config=quantisation, device_map="cpu"
        )

    loaded = PeftModel.from_pretrained(quantised(0), folder)
    assert float((logits(loaded).float() - expected).norm() / expected.norm()) < (0.1 if bits == 8 else 0.5)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(quantised(1), folder)
    # and the other way: trained over the quantised base, loaded on the whole one
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(llama(**WIDE), tmp_path / "again")), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (lambda: llama(num_hidden_layers=3, **WIDE), "num_hidden_layers was 2, here it is 3"),
        (
            lambda: llama(num_attention_heads=2, num_key_value_heads=1, hidden_size=64, intermediate_size=64, head_dim=32),
            "another",
        ),
    ],
)
def test_t16_other_sizes_are_named(other, part, saved):
    folder, _ = saved
    with pytest.raises(CheckpointError) as error:
        PeftModel.from_pretrained(other(), folder)
    assert part in str(error.value) or "missing" in str(error.value) or "shape" in str(error.value)


def test_t16_another_architecture_with_the_same_names(tmp_path):
    """Mistral's layers are called as Llama's are."""
    get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path)
    own = llama().config.to_dict()
    config = tf.MistralConfig(**{k: own[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                                    "num_attention_heads", "num_key_value_heads", "head_dim")})  # fmt: skip
    with pytest.raises(BaseMismatchError, match="trained on a llama model, this is a mistral"):
        PeftModel.from_pretrained(tf.MistralForCausalLM(config), tmp_path)


@pytest.mark.parametrize("way", ["merged", "modules_to_save", "biases", "resized"])
def test_t16_what_training_changes_does_not_count(way, tmp_path):
    base = gpt2()
    options = {"modules_to_save": {"modules_to_save": ["ln_f", "wpe"]}, "biases": {"bias": "all"}}.get(way, {})
    if way == "resized":
        base.resize_token_embeddings(101, mean_resizing=False)
    model = stir(
        get_peft_model(base, LoraConfig(r=3, target_modules=["c_attn", "c_proj", "c_fc", "wte"], **options)), scale=1.0
    )
    expected = logits(model)
    if way == "merged":
        model.merge_adapter()
    model.save_pretrained(tmp_path, save_embedding_layers=way == "resized")
    if way == "merged":
        assert model.adapters.merged == ("default",)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), expected, rtol=0, atol=0)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(gpt2(seed=3), tmp_path)


def test_t16_a_second_adapter_is_checked_against_the_stored_weights(tmp_path):
    stir(get_peft_model(llama(), LoraConfig(r=3, target_modules="all-linear"))).save_pretrained(tmp_path)
    model = stir(get_peft_model(llama(), LoraConfig(r=3, target_modules="all-linear")), scale=2.0)
    model.merge_adapter()
    model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default", "second"]


def test_t16_folders_of_peft_have_no_fingerprint_and_load(tmp_path):
    import warnings

    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(bert(), peft.LoraConfig(r=3)).save_pretrained(tmp_path)
    assert not (tmp_path / "afina.json").exists()
    assert PeftModel.from_pretrained(bert(seed=1), tmp_path)


def test_t16_a_broken_fingerprint_file(saved):
    folder, _ = saved
    kept = json.loads((folder / "afina.json").read_text())
    assert kept["base"]["weights"]
    for text in ("{", "[1]", "3"):
        (folder / "afina.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"afina\.json"):
            PeftModel.from_pretrained(llama(**WIDE), folder)
