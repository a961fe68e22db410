"""Writing down speech, token by token and letter by letter: padding, losses, letters, what is refused, stored weights."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from sound_bases import (
    save_ast,
    save_moonshine,
    save_two_models,
    save_wav2vec2_ctc,
    save_whisper,
    write_sounds,
    write_transcripts,
)

from afina.core.files import read_weights
from afina.errors import ConfigError, DataError
from afina.tasks.catalogue import find_task
from afina.tasks.speech_recognition import SpeechOptions
from afina.tasks.transcripts import error_rates, plain_words, spelled, word_errors
from afina.training.models import find_model, load_config, load_processor
from afina.training.recipe import DataOptions, MemoryOptions, Recipe, TrainingOptions
from afina.training.run import prepare
from afina.training.trained import TrainedRun

LETTERS = "13w"
BASES = {
    "whisper": save_whisper, "two": save_two_models, "ctc": save_wav2vec2_ctc,
    "ctc group": lambda folder: save_wav2vec2_ctc(folder, "group"),
    "ctc letters": lambda folder: save_wav2vec2_ctc(folder, "layer", LETTERS),
}  # fmt: skip
TOLD = {"whisper": {"language": "en", "max_new_tokens": 20}, "two": {"max_new_tokens": 5}}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    write_transcripts(folder / "rows", 53)
    for name, save in BASES.items():
        save(folder / name)
    return folder


def recipe(places, base, *, options=(), file="rows", weights="fp32", checkpointing=False, **training):
    return Recipe(
        task={"name": "speech_recognition", **TOLD.get(base, {}), **dict(options)}, model=str(places / base),
        data=DataOptions(file=str(places / file / "metadata.csv")), method={"name": "lora", "r": 3},
        memory=MemoryOptions(weights=weights, gradient_checkpointing=checkpointing),
        training=TrainingOptions(**{"epochs": 2, "batch_size": 7, "learning_rate": 5e-3, "precision": "fp32", **training}),
    )  # fmt: skip


@pytest.fixture
def run(places, tmp_path):
    def made(base, name="run", **more):
        return prepare(recipe(places, base, **more), tmp_path / name)

    return made


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# --- padding and losses


@pytest.mark.parametrize("base", BASES)
def test_t25_a_recording_means_the_same_whatever_stands_beside_it(run, base):
    made = run(base)
    task, model, features = made.task, made.model.eval(), made.rows["train"].features[:5]
    assert len({f["length"] for f in features}) > 1
    together = task.final_answers(model, task.collate(features))
    each = [task.final_answers(model, task.collate([f]))[0] for f in features]
    assert [task.known(a)[0] for a in together] == pytest.approx([task.known(a)[0] for a in each], rel=1e-4)
    assert [a.text for a in together] == [a.text for a in each]
    assert len({round(task.known(a)[0], 4) for a in each}) == len(features)


@pytest.mark.parametrize("base", BASES)
def test_the_loss_is_that_of_the_model_itself(run, base):
    made = run(base)
    task, model = made.task, made.model.eval()
    batch = task.collate(made.rows["train"].features[:1])
    base_model = model.get_base_model()
    base_model.config.ctc_loss_reduction = "sum"
    with torch.no_grad():
        ours = task.loss_sum(model, batch)
        theirs = model(**task.heard(batch), **{k: v for k, v in batch.items() if k == "decoder_input_ids"},
                       **({} if "decoder_input_ids" in batch else {"labels": batch["labels"]}))  # fmt: skip
    if "decoder_input_ids" in batch:
        right = F.cross_entropy(theirs.logits[0], batch["labels"][0], reduction="sum")
        assert not task.paths(model), "logits are made whole"
    else:
        right = theirs.loss
    torch.testing.assert_close(ours, right)
    assert task.targets_in(batch) == (batch["labels"] != -100).sum()


@pytest.mark.parametrize("base", ["whisper", "ctc"])
def test_gradient_checkpointing_changes_nothing(run, base):
    found = []
    for on in (False, True):
        made = run(base, str(on), checkpointing=on, epochs=1, options={"generate": False} if base == "whisper" else {})
        made.execute()
        found.append(losses(made.output))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# --- what is learned


@pytest.mark.parametrize(("base", "epochs"), [("whisper", 18), ("two", 18), ("ctc", 40)])
def test_every_way_learns_to_write(run, base, epochs):
    """By heart, for random weights tell one tone from another badly. Letters, for a word is wrong where one of them is."""
    made = run(base, epochs=epochs, learning_rate=1e-2 if base != "ctc" else 2e-2)
    metrics = made.execute()
    assert ("untuned" in metrics["baselines"]) == (base != "ctc")
    trained = TrainedRun.load(made.output)
    found = {}
    for name in ("train", "test"):
        examples = made.rows[name].examples
        answers = trained.answers(trained.asked([e.row for e in examples]))
        found[name] = error_rates([a.text for a in answers], [e.label for e in examples])
    assert found["test"] == {key: metrics["test"][key] for key in found["test"]}
    assert found["train"]["cer"] < metrics["baselines"]["commonest"]["cer"]


def test_t05_letters_come_from_the_transcripts_and_their_layer_is_trained_and_kept(run):
    made = run("ctc", epochs=1)
    assert made.task.tokenizer.get_vocab().keys() >= set(LETTERS) | {"|", "<pad>", "<unk>"}
    made.execute()
    stored = read_weights(made.output / "adapter" / "adapter_model.safetensors")
    head = next(weight for name, weight in stored.items() if "lm_head" in name and name.endswith("weight"))
    assert len(head) == len(made.task.tokenizer) == made.task.settings()["letters"]
    again = TrainedRun.load(made.output).task
    assert again.tokenizer.get_vocab() == made.task.tokenizer.get_vocab()


def test_a_base_keeps_its_letters(places, run):
    made = run("ctc letters", epochs=1)
    made.execute()
    assert not [name for name in read_weights(made.output / "adapter" / "adapter_model.safetensors") if "lm_head" in name]
    own = tf.Wav2Vec2ForCTC.from_pretrained(places / "ctc letters").lm_head.weight
    assert (made.model.get_base_model().lm_head.weight.cpu() == own).all()


def test_t03_a_killed_run_of_letters_goes_on_as_if_it_had_not_stopped(run):
    whole = run("ctc")
    whole.execute()

    def die(line):
        if line.get("step") == 4 and "loss" in line:
            raise MemoryError

    with pytest.raises(MemoryError):
        run("ctc", "again", checkpoint_every=3).execute(die)
    prepare(recipe_of(whole, checkpoint_every=3), whole.output.parent / "again", resume=True).execute()
    assert losses(whole.output.parent / "again") == losses(whole.output)


def recipe_of(made, **training):
    for key, value in training.items():
        setattr(made.recipe.training, key, value)
    return made.recipe


@pytest.mark.parametrize(("base", "weights"), [("whisper", "int8"), ("whisper", "nf4"), ("ctc", "nf4")])
def test_the_base_may_be_stored_in_few_bits(run, base, weights):
    pytest.importorskip("bitsandbytes")
    made = run(base, weights=weights, epochs=3, learning_rate=1e-2)
    stored = {type(m).__name__ for m in made.model.modules()}
    assert any("8bit" in name or "4bit" in name for name in stored), stored
    made.execute()
    found = losses(made.output)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


# --- what is refused and told


def test_what_the_vocabulary_lacks_is_told_with_the_cure(places, tmp_path, run):
    for said, cure in (("W1", "task.case=lower"), ("w1!", "task.punctuation=false"),
                       ("W1!", "task.case=lower task.punctuation=false")):  # fmt: skip
        place = tmp_path / said
        write_transcripts(place, said=(said, "w3"))
        with pytest.raises(DataError, match=rf"characters of 12 of 23 transcripts \(one in line \d+\).*Say {cure}, or"):
            run("ctc letters", file=place)
        given = dict(one.removeprefix("task.").split("=") for one in cure.split())
        run("ctc letters", file=place, options={k: v if k == "case" else False for k, v in given.items()})


def test_more_letters_than_places_are_refused_by_line(run, tmp_path):
    write_transcripts(tmp_path / "rows", 11, said=("w1 " * 31, "w3"))
    with pytest.raises(DataError, match=r"line 2: \d+ letters in 0\.\d+ seconds") as said:
        run("ctc", file=tmp_path / "rows")
    assert "5 problems" in str(said.value)
    assert "1 more rows are like that" in str(said.value)
    assert "line 3" not in str(said.value)


@pytest.mark.parametrize("base", ["whisper", "ctc"])
def test_transcripts_that_leave_nothing_are_named(run, base, tmp_path):
    file = write_transcripts(tmp_path / "rows", 23)
    lines = file.read_text().splitlines()
    lines[3], lines[8] = '2.wav,"..."', '7.wav,""'
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"line 4: the transcript '\.\.\.' has no token"):
        run(base, file=tmp_path / "rows", options={"punctuation": False})
    made = run(base, file=tmp_path / "rows")
    assert sum(len(rows.examples) for rows in made.rows.values()) == 22  # the row without one is counted, and left out
    assert "1 row" in "\n".join(made.divided.lines())


def test_t30_a_transcript_that_the_decoder_cannot_hold_is_counted(run, tmp_path):
    write_transcripts(tmp_path / "rows", said=("w1 " * 30, "w3"))
    with pytest.raises(DataError, match=r"12 of 23 rows \(52%\) are cut off: .*; 12 transcripts are .* to 61 tokens"):
        run("whisper", file=tmp_path / "rows")


def test_what_does_not_go_with_a_model_is_told(places, run, tmp_path):
    cases = (
        ("whisper", {"language": "klingon"}, "task.language=klingon: Unsupported language"),
        ("two", {"language": "en"}, "not told its language"),
        ("ctc", {"num_beams": 3, "language": "en"}, r"task\.language, task\.num_beams: of models with a decoder"),
        ("whisper", {"language": "", "speech_task": "translate"}, r"task\.speech_task=translate goes with task\.language"),
    )
    for base, options, said in cases:
        with pytest.raises(ConfigError, match=said):
            run(base, options=options)
    save_moonshine(tmp_path / "base")
    with pytest.raises(ConfigError, match="GroupNorm of its encoder would see the padding"):
        prepare(recipe(tmp_path, "base", file=places / "rows"), tmp_path / "run")
    save_ast(places / "ast")
    with pytest.raises(ConfigError, match="transformers has none of the architecture audio-spectrogram-transformer"):
        run("ast")
    several = tf.GenerationConfig.from_pretrained(save_whisper(tmp_path / "several"))
    several.is_multilingual, several._from_model_config = True, False
    several.save_pretrained(tmp_path / "several")
    with pytest.raises(ConfigError, match=r"task\.language is missing: this model knows several languages"):
        prepare(recipe(tmp_path, "several", file=places / "rows"), tmp_path / "run")


def test_whisper_is_told_what_to_do(places):
    source = find_model(str(places / "whisper"))
    way = find_task("speech_recognition").for_base(load_config(source))
    task = way(load_processor(source, "speech"), SpeechOptions(language="catalan", speech_task="translate"))
    told = task.tokenizer.convert_ids_to_tokens(task.learned["begin"])
    assert told == ["<|startoftranscript|>", "<|ca|>", "<|translate|>", "<|notimestamps|>"]


def test_broken_recordings_are_collected(places, run, tmp_path):
    write_transcripts(tmp_path / "rows", 11)
    (tmp_path / "rows" / "2.wav").write_bytes((tmp_path / "rows" / "2.wav").read_bytes()[:700])
    (tmp_path / "rows" / "5.wav").write_bytes(b"")
    (tmp_path / "rows" / "7.wav").unlink()
    with pytest.raises(DataError) as said:
        run("whisper", file=tmp_path / "rows")
    for line, what in ((4, "truncated"), (7, "empty"), (9, "no such file")):
        assert any(f"line {line}" in part and what in part for part in str(said.value).splitlines()), (line, what)


# --- words


def test_error_rates_count_words_and_letters():
    assert error_rates(["a b c"], ["A, b c!"]) == {"wer": 0.0, "cer": 0.0, "wer_as_written": pytest.approx(2 / 3)}
    found = error_rates(["one too three four", ""], ["one two three", "..."])
    assert found["wer"] == pytest.approx(2 / 3)
    assert found["cer"] == pytest.approx(6 / 13)
    assert word_errors("one two three", "one too three four") == (2, 3)
    assert word_errors("...", "one") == (1, 0)
    assert error_rates([], []) == {"wer": 0.0, "cer": 0.0, "wer_as_written": 0.0}


def test_spelling():
    assert spelled("Don't  stop,\tnow!", "upper", False) == "DON'T STOP NOW"
    assert spelled(" A b ", "as_written") == "A b"
    assert plain_words("Stra\u00dfe \u2019s -- 3,5") == "strasse 's 3 5"


def test_a_folder_of_classes_is_no_list_of_transcripts(places, run, tmp_path):
    write_sounds(tmp_path / "rows", 3)
    (tmp_path / "rows" / "metadata.csv").write_text("file_name,sex\nlow/1.wav,m\n")
    with pytest.raises(ConfigError, match=r"data\.label"):
        run("whisper", file=tmp_path / "rows")


def test_t03_no_part_of_two_models_draws_behind_the_back_of_the_run(run):
    configs = [module.config for module in run("two").model.modules() if hasattr(module, "config")]
    assert any(hasattr(config, "apply_spec_augment") for config in configs)
    assert not any(getattr(config, name, 0) for config in configs for name in ("apply_spec_augment", "layerdrop"))
