"""What a user's program does with the hub. Run by `test_hub.py` in a process of its own, since huggingface_hub reads its
settings when it is imported; prints what happened as JSON."""

import json
import sys
from pathlib import Path

import torch
import transformers as tf

from afina import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from afina.errors import AfinaError

IDS = torch.tensor([[5, 7, 11, 13]])


def base():
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=97, hidden_size=20, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2,
                            max_position_embeddings=64)  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


def adapted(seed, model=None, **options):
    made = get_peft_model(model or base(), LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"), **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    return made


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def same(model, other):
    return bool(torch.equal(logits(model), logits(other)))


def error(load):
    try:
        load()
    except AfinaError as caught:
        return f"{type(caught).__name__}: {caught}"
    except Exception as caught:
        return f"NOT AFINA'S {type(caught).__name__}: {caught}"
    return "no error"


def main(folder):
    found = {}
    base().push_to_hub("tester/base")
    found["url"] = str(adapted(1).push_to_hub("tester/adapter"))
    adapted(2).push_to_hub("tester/adapter", commit_message="Better")  # a second commit
    found["latest"] = same(PeftModel.from_pretrained(base(), "tester/adapter"), adapted(2))
    found["config"] = type(PeftConfig.from_pretrained("tester/adapter")).__name__

    from huggingface_hub import HfApi

    HfApi().create_branch("tester/adapter", branch="old")
    adapted(1).push_to_hub("tester/adapter", revision="old")
    found["revision"] = same(PeftModel.from_pretrained(base(), "tester/adapter", revision="old"), adapted(1))

    several = adapted(3)
    several.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    several.push_to_hub("tester/several")
    several.set_adapter("second")
    found["subfolder"] = same(PeftModel.from_pretrained(base(), "tester/several", subfolder="second"), several)
    model = PeftModel.from_pretrained(base(), "tester/several")
    model.load_adapter("tester/adapter", "more")
    model.set_adapter("more")
    found["load_adapter"] = same(model, adapted(2))

    hosted = tf.AutoModelForCausalLM.from_pretrained("tester/base")
    found["base name"] = hosted.config._name_or_path
    adapted(4, hosted).push_to_hub("tester/complete")
    want = adapted(4, base())
    found["auto"] = same(AutoPeftModel.from_pretrained("tester/complete"), want)
    found["auto task"] = same(AutoPeftModelForCausalLM.from_pretrained("tester/complete", is_trainable=True), want)

    adapted(5).push_to_hub("tester/secret", private=True)
    found["private"] = same(PeftModel.from_pretrained(base(), "tester/secret"), adapted(5))
    found["private, no token"] = error(lambda: PeftModel.from_pretrained(
        base(), "tester/secret", token=False, cache_dir=Path(folder) / "empty"))  # fmt: skip

    adapted(6).save_pretrained(Path(folder) / "named", push_to_hub=True, repo_id="tester/along")
    found["along"] = same(PeftModel.from_pretrained(base(), "tester/along"), adapted(6))

    found["no repository"] = error(lambda: PeftModel.from_pretrained(base(), "tester/adaptre"))
    found["no revision"] = error(lambda: PeftModel.from_pretrained(base(), "tester/adapter", revision="nope"))
    found["no adapter"] = error(lambda: PeftModel.from_pretrained(base(), "tester/base"))
    found["no weights"] = error(lambda: PeftModel.from_pretrained(base(), "tester/half"))
    found["bad name"] = error(lambda: PeftModel.from_pretrained(base(), "no such name!"))
    found["other base"] = error(lambda: PeftModel.from_pretrained(
        tf.LlamaForCausalLM(base().config), "tester/adapter"))  # fmt: skip
    found["upload refused"] = error(lambda: adapted(1).push_to_hub("tester/adapter", token="hf_wrong"))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
