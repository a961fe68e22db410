"""T8: an enlarged vocabulary: size mismatch or wrong rows at load."""

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trap_models import gpt2, ids, llama, logits, reload, stir

from afina import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from afina.core.vocabulary import tokenizer_hash
from afina.errors import BaseMismatchError, CheckpointError, TargetError

NEW = torch.tensor([[98, 5, 99, 7]])


def tokenizer(words):
    known = {f"w{i}": i for i in range(words)} | {"[UNK]": words}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(known, unk_token="[UNK]")), unk_token="[UNK]")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    llama(tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def base(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("saved", [False, True], ids=["rows stored", "modules_to_save"])
def test_t08_a_fresh_base_is_resized_at_load(saved, folder, tmp_path):
    model = base(folder)
    model.resize_token_embeddings(101, mean_resizing=False)
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True} if saved else {}
    if saved and not model.config.tie_word_embeddings:
        options = {"modules_to_save": ["embed_tokens", "lm_head"]}
    model = stir(get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], **options)))
    model.save_pretrained(tmp_path / "adapter")
    fresh = base(folder)
    assert fresh.get_input_embeddings().weight.shape[0] == 97
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert logits(loaded).shape[-1] == 101
    torch.testing.assert_close(logits(loaded, input_ids=NEW), logits(model, input_ids=NEW), rtol=0, atol=0)
    # resized by hand first, with other random rows: the stored ones are taken
    other = base(folder)
    other.resize_token_embeddings(101, mean_resizing=False)
    loaded = PeftModel.from_pretrained(other, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, input_ids=NEW), logits(model, input_ids=NEW), rtol=0, atol=0)


def test_t08_the_naive_way_gives_other_rows(folder):
    one, two = base(folder), base(folder)
    for model in (one, two):
        model.resize_token_embeddings(101, mean_resizing=False)
    assert not torch.allclose(logits(one, input_ids=NEW), logits(two, input_ids=NEW))


def test_t08_the_base_of_a_failed_load_is_as_it_was(folder, tmp_path):
    model = base(folder)
    model.resize_token_embeddings(101, mean_resizing=False)
    stir(get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"]))).save_pretrained(tmp_path / "adapter")
    from safetensors.torch import save_file

    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    state.pop(next(k for k in state if "lora_A" in k))
    save_file(state, path, metadata={"format": "pt"})
    fresh = base(folder)
    before = logits(fresh)
    with pytest.raises(CheckpointError, match="missing"):
        PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert fresh.get_input_embeddings().weight.shape[0] == 97
    torch.testing.assert_close(logits(fresh), before, rtol=0, atol=0)


def test_t08_without_stored_rows_the_cure_is_named(tmp_path):
    model = llama()  # made from a configuration: there is no checkpoint to compare the size with
    model.resize_token_embeddings(101, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings\(101\)") as error:
        PeftModel.from_pretrained(llama(), tmp_path)
    assert "97" in str(error.value)
    cured = llama()
    cured.resize_token_embeddings(101, mean_resizing=False)
    assert PeftModel.from_pretrained(cured, tmp_path)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(llama(), tmp_path), input_ids=NEW), logits(model, input_ids=NEW), rtol=0, atol=0
    )


def test_t08_a_second_adapter_of_another_vocabulary_is_refused(folder, tmp_path):
    model = base(folder)
    model.resize_token_embeddings(101, mean_resizing=False)
    get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    first = get_peft_model(base(folder), LoraConfig(r=3, target_modules=["q_proj"]))
    before = logits(first)
    with pytest.raises(CheckpointError, match="load this one first"):
        first.load_adapter(tmp_path / "adapter", "second")
    torch.testing.assert_close(logits(first), before, rtol=0, atol=0)


def test_t08_another_tokenizer_is_noticed(tmp_path):
    model = stir(get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path, tokenizer=tokenizer(90))
    with pytest.raises(BaseMismatchError, match="another tokenizer") as error:
        PeftModel.from_pretrained(llama(), tmp_path, tokenizer=tokenizer(89))
    assert "saved beside it" in str(error.value)
    beside = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, tokenizer=beside)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    longer = tokenizer(90)
    longer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    with pytest.raises(BaseMismatchError, match="tokenizer"):
        PeftModel.from_pretrained(llama(), tmp_path, tokenizer=longer)


def test_t08_tokens_beyond_the_vocabulary():
    for config in (TrainableTokensConfig(token_indices=[5, 97]),
                   LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 97])):  # fmt: skip
        with pytest.raises(TargetError, match=r"\[97\]") as error:
            get_peft_model(llama(), config)
        assert "resize_token_embeddings" in str(error.value)


def test_t08_trained_tokens_of_an_enlarged_vocabulary(tmp_path):
    plain = reload(tmp_path / "base", gpt2())
    plain.resize_token_embeddings(101, mean_resizing=False)
    config = LoraConfig(r=3, target_modules=["c_attn"], trainable_token_indices=[98, 99])
    model = stir(get_peft_model(plain, config))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(reload(tmp_path / "base", gpt2()), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, input_ids=NEW), logits(model, input_ids=NEW), rtol=0, atol=0)
    assert ids().max() < 97


def test_t08_a_tokenizer_that_gets_tokens_has_another_hash():
    made, other = tokenizer(7), tokenizer(7)
    first = tokenizer_hash(made)
    assert tokenizer_hash(other) == first
    made.add_tokens(["<new>"])
    second = tokenizer_hash(made)
    made.add_special_tokens({"pad_token": "<new>"})
    assert len({first, second, tokenizer_hash(made)}) == 3
    assert tokenizer_hash(other) == first
