"""Merged models: bounded memory, ties, new words, shards, and what a quantised base makes of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from runs_made import case, exported, finished, language_run

import afina
from afina.errors import CheckpointError, MergeError
from afina.export.merged import merged_tensors, read_merged, write_shards
from afina.training.trained import TrainedRun

MEASURED = """
import sys, threading, time, torch, transformers as tf
from pathlib import Path
from afina import LoraConfig, PeftModel
from afina.export.merged import merged_tensors, write_shards

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

folder, torch.manual_seed = Path(sys.argv[1]), torch.manual_seed
torch.set_num_threads(1)
model = tf.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
adapted = PeftModel.from_pretrained(model, folder / "adapter")
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
(folder / "merged").mkdir()
write_shards(folder / "merged", merged_tensors(adapted.adapters), shard=4 << 20)
done = True
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_is_bounded_by_a_shard_not_by_the_model(tmp_path):
    config = tf.LlamaConfig(
        vocab_size=499, hidden_size=256, num_hidden_layers=23, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=1021, max_position_embeddings=61,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base", max_shard_size="20MB")
    size = 4 * sum(p.numel() for p in model.parameters())
    adapted = afina.get_peft_model(model, afina.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(0, 499, (2, 13))
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
    said = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert size > 80 << 20
    assert int(said.stdout.split()[-1]) < size / 4
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 10
    with torch.no_grad():
        torch.testing.assert_close(read_merged(tmp_path / "merged")(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [
    {"target_modules": ["wte"]}, {"target_modules": ["lm_head"]}, {"target_modules": ["wte"], "ensure_weight_tying": True},
    {"modules_to_save": ["wte", "lm_head"]},
], ids=["table", "head", "both", "saved"])  # fmt: skip
def test_t06_tied_embeddings_stay_tied_only_where_they_are_equal(method, tmp_path):
    run = language_run("GPT-2", tmp_path / "made", **method)
    done = exported(run, "merged", tmp_path / "out")
    assert done.replay.largest < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    tied = config.get("tie_word_embeddings", True)
    assert tied == ("ensure_weight_tying" in method)
    model = read_merged(tmp_path / "out")
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(head, table) == tied


def test_t08_new_words_are_in_the_model(tmp_path):
    recipe = case("sequence_classification", tmp_path / "made", epochs=2)
    recipe.data.new_tokens = ["zeugma", "litotes"]
    done = exported(finished(recipe, tmp_path / "made" / "run"), "merged", tmp_path / "out")
    rows = read_merged(tmp_path / "out").get_input_embeddings().weight.shape[0]
    assert rows == len(tf.AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert done.replay.largest < 1e-4


def test_sixteen_bits_where_they_are_asked_for(runs, tmp_path):
    done = exported(runs("sequence_classification"), "merged", tmp_path / "out", dtype="bf16")
    assert read_merged(tmp_path / "out").dtype == torch.bfloat16
    assert 0 < done.replay.largest < 3e-2
    with pytest.raises(MergeError, match="--dtype int8"):
        exported(runs("sequence_classification"), "merged", tmp_path / "other", dtype="int8")


def test_values_that_are_no_numbers_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.weight.*not finite"):
        write_shards(tmp_path, iter([{"a.weight": torch.tensor([1.0, float("nan")])}]))


def test_what_was_walked_is_let_go(runs):
    trained = TrainedRun.load(runs("sequence_classification"))
    layers = sum(1 for part in merged_tensors(trained.model.adapters) for _ in part)
    assert layers > 20
    left = [n for n, _ in trained.model.get_base_model().named_parameters() if ".adapters." not in n]
    assert not left


# --- quantised bases


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    recipe = case("causal_lm", tmp_path_factory.mktemp("nf4"), epochs=3, learning_rate=2e-2)
    recipe.memory.weights = "nf4"
    return finished(recipe, tmp_path_factory.mktemp("runs") / "nf4")


def test_t17_a_merge_is_measured_and_not_rounded_into_four_bits(quantised, tmp_path):
    done = exported(quantised, "merged", tmp_path / "out")
    assert done.replay.largest < 1e-4  # GPT-2's transposed layers too
    assert any("stored in nf4 again" in note and "of what the adapter does" in note for note in done.notes)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))


def test_t18_both_bases_are_shown_and_the_other_one_is_refused_unless_accepted(quantised, tmp_path):
    with pytest.raises(MergeError, match=r"(?s)T18.*--base quantised.*--base pristine.*this is what was taken.*--max-error"):
        exported(quantised, "merged", tmp_path / "out", base="pristine", max_error=0.01)
    assert not any(tmp_path.iterdir())
    done = exported(quantised, "merged", tmp_path / "out", base="pristine", max_error=100.0)
    assert done.replay.largest > 1e-5
    assert "loss" in done.figures
    assert sum("outputs differ by" in note for note in done.notes) == 2
