"""For each task there is: rows, a tiny base, and a recipe. A task that is not here fails the tests of this folder."""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

import diffusion_bases
import document_bases
import picture_bases
import sound_bases
import soundfile
import tiny_bases
import torch
import transformers as tf

from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare

WORDS = tiny_bases.WORDS
REWARDS = Path(__file__).with_name("rewards_made.py")


def classified(chance):
    label = chance.choice(sorted(tiny_bases.TELLING))
    return {"text": _text(chance, chance.choice(tiny_bases.TELLING[label])), "label": label}


def several(chance):
    words = [word for words in tiny_bases.TELLING.values() for word in words][:3]
    inside = chance.sample(words, chance.randrange(3))
    return {"text": _text(chance, *inside), "label": inside}


def numbered(chance):
    words = chance.choices(WORDS, k=7)
    return {"text": " ".join(words), "label": sum(int(w[1:]) for w in words) / 7}


def tagged(chance):
    words = chance.choices(WORDS, k=chance.randrange(3, 11))
    return {"tokens": words, "tags": ["B-LOW" if int(w[1:]) < 9 else "O" for w in words]}


def asked(chance):
    words = chance.sample(WORDS, 13)
    place = chance.randrange(1, 12)
    context = " ".join(words)
    answer = words[place + 1] if place < 12 else words[0]
    start = len(" ".join(words[: words.index(answer)])) + (1 if words.index(answer) else 0)
    return {"question": words[place], "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def instructed(chance):
    words = chance.choices(WORDS, k=chance.randrange(3, 8))
    return {"prompt": " ".join(words), "completion": " ".join(words[::-1])}


def translated(chance):
    words = chance.choices(WORDS, k=chance.randrange(3, 8))
    return {"source": " ".join(words), "target": " ".join(words[:3])}


def preferred(chance):
    words = chance.choices(WORDS, k=chance.randrange(3, 8))
    good, bad = (chance.choices(words_, k=chance.randrange(2, 6)) for words_ in (WORDS[:13], WORDS[13:]))
    return {"prompt": " ".join(words), "chosen": " ".join(good), "rejected": " ".join(bad)}


def judged(chance):
    row = preferred(chance)
    good = chance.random() < 0.5
    return {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}


def prompted(chance):
    return {"prompt": " ".join(chance.choices(WORDS, k=chance.randrange(3, 8)))}


def alike(chance):
    words = chance.choices(WORDS, k=9)
    kept = chance.randrange(1, 8)
    other = [*words[:kept], *chance.choices(WORDS, k=9 - kept)]
    return {"text": " ".join(words), "text_pair": " ".join(other), "score": kept / 9}


def subject(chance):
    return {"image": pictured(chance)["image"], "prompt": f"a photo of sks {chance.choice(['dog', 'teapot'])}"}


def pictured(chance):
    label = chance.choice(picture_bases.SHAPES)
    return {"image": picture_bases.picture(label, chance), "label": label}


def sounded(chance):
    label = chance.choice(sorted(sound_bases.PITCHES))
    return {"audio": sound_bases.sound(label, chance), "label": label}


def spoken(chance):
    row = sounded(chance)
    return {"audio": row["audio"], "text": f"{row['label']} {chance.choice(WORDS)}"}


def segmented(chance):
    made, mask = picture_bases.disc_and_mask(chance)
    return {"image": made, "mask": mask}


def searched(chance):
    words = chance.sample(WORDS, 7)
    wrong = [" ".join(chance.choices(WORDS, k=chance.randrange(2, 9))) for _ in range(chance.randrange(1, 4))]
    return {"query": " ".join(words[:3]), "passage": " ".join(words), "negatives": wrong}


def _text(chance, *inside):
    words = [*chance.choices(WORDS, k=chance.randrange(2, 13)), *inside]
    chance.shuffle(words)
    return " ".join(words)


def save_t5(folder):
    made = tiny_bases.tokenizer()
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=len(made), d_model=24, d_kv=12, d_ff=29, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0,
        eos_token_id=3, decoder_start_token_id=0,
    )  # fmt: skip
    made.eos_token = "[SEP]"
    tf.T5ForConditionalGeneration(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def save_causal(folder):
    made = tiny_bases.tokenizer(encoder=False)
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=len(made), n_embd=24, n_layer=1, n_head=2, n_positions=61, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.2, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    tf.GPT2LMHeadModel(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


CASES = {
    "sequence_classification": (classified, tiny_bases.save_bert, {}),
    "multi_label_classification": (several, tiny_bases.save_bert, {}),
    "regression": (numbered, tiny_bases.save_bert, {}),
    "token_classification": (tagged, tiny_bases.save_bert, {}),
    "document_token_classification": (document_bases.row, document_bases.save_base, {"boxes": "pixels"}),
    "question_answering": (asked, tiny_bases.save_bert, {}),
    "causal_lm": (instructed, save_causal, {"max_new_tokens": 5, "generate": True}),
    "seq2seq": (translated, save_t5, {"max_new_tokens": 5}),
    "reranking": (searched, tiny_bases.save_bert, {}),
    "sentence_similarity": (alike, tiny_bases.save_bert, {}),
    "semantic_segmentation": (segmented, picture_bases.save_segformer, {"augment": "crop_and_flip"}),
    "image_classification": (pictured, picture_bases.save_vit, {"augment": "crop_and_flip"}),
    "audio_classification": (sounded, sound_bases.save_wav2vec2, {}),
    "speech_recognition": (spoken, sound_bases.save_whisper, {"max_new_tokens": 5, "language": "en"}),
    "reward": (preferred, tiny_bases.save_bert, {}),
    "dpo": (preferred, save_causal, {"max_new_tokens": 5, "generate": True}),
    "orpo": (preferred, save_causal, {"max_new_tokens": 5, "generate": True}),
    "kto": (judged, save_causal, {"max_new_tokens": 5, "generate": True}),
    "grpo": (prompted, save_causal, {"reward": f"{REWARDS}:w_words", "max_new_tokens": 5, "group": 3, "beta": 0.5}),
}
# On pipelines: what a test of models of transformers asks is asked of these in tests/training/test_dreambooth.py.
PIPELINES = {
    "dreambooth": (
        subject,
        diffusion_bases.save_sd,
        {"instance_prompt": "a photo of sks dog", "show_pictures": 0, "resolution": 16},
    ),
}
EVERY = CASES | PIPELINES


def case(name, folder, rows=47, **training):
    """The recipe of a task on rows of its own in a folder, which is made."""
    row, save, options = EVERY[name]
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(name)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for n in range(rows):
            made = row(chance)
            for key in made.keys() & {"image", "mask"}:
                made[key].save(folder / f"{key}{n}.png")
                made[key] = f"{key}{n}.png"
            if "audio" in made:
                soundfile.write(folder / f"audio{n}.wav", made["audio"], 8000)
                made["audio"] = f"audio{n}.wav"
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
    if not (folder / "base").is_dir():
        save(folder / "base")
    return Recipe(
        task={"name": name, **options},
        model=str(folder / "base"),
        data=DataOptions(file=str(folder / "rows.jsonl")),
        method={"name": "lora", "r": 3, "target_modules": "all-linear"},
        training=TrainingOptions(
            **{"epochs": 2, "batch_size": 7, "learning_rate": 5e-3, "precision": "fp32", "max_truncated": 0.5, **training}
        ),
    )


@functools.cache
def finished(name):
    """The run of a task, made once a process: its folder, the run, its metrics. Tests leave them as they are."""
    place = Path(tempfile.mkdtemp(prefix="afina-tests-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    run = prepare(case(name, place / name, batch_size=8), place / name / "run")
    return place / name, run, run.execute()
