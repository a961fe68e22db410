"""Instructions, conversations and running text: what is learned of a row, and that a question is asked as it was learned."""

from __future__ import annotations

import json
import math

import chat_templates
import pytest
import torch
from language_bases import CAUSAL, features_of, gpt2_like, llama_like, rows_of, save, task_of
from tasks_made import gradient, made, trained

from afina.data.columns import chosen_columns
from afina.data.options import DataOptions
from afina.data.table import Table
from afina.errors import ConfigError, DataError, Problems
from afina.tasks.catalogue import find_task
from afina.tasks.generation import generated
from afina.tasks.task import IGNORED, Rows
from afina.training.loop import make_engine, predict
from afina.training.recipe import Recipe, TrainingOptions
from afina.training.run import prepare
from afina.training.trained import TrainedRun

TOKENIZERS = {
    "llama": llama_like,
    "llama without begin": lambda: llama_like(begins=False),
    "gpt2": gpt2_like,
    "gpt2 with begin": lambda: gpt2_like(begins=True),
}
TALK = [
    {"role": "user", "content": "What is the capital of Norway?"},
    {"role": "assistant", "content": "Oslo is.\n\nIt lies at the sea."},
    {"role": "user", "content": "And why?"},
    {"role": "assistant", "content": "The fox jumps over és 13 dogs!"},
]
PAIRS = [
    {"text": "Name seven fruits.", "label": "red, and where they grow"},
    {"text": "Translate the sentence", "text_pair": "the dog is small", "label": "el gos és petit"},
    {"text": "Why?", "label": "No."},
    {"text": "What is the capital of Norway? Say it in one word, and say why.", "label": "Oslo"},
    {"text": "think of 13 dogs", "label": "quick brown lazy dogs, and a fox that jumps over them"},
]


def spans(feature):
    """Runs of targets, as lists of ids."""
    found, open_ = [], False
    for token, label in zip(feature["input_ids"], feature["labels"], strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            open_ = False
        else:
            found, open_ = [*found[:-1], [*found[-1], token]] if open_ else [*found, [token]], True
    return found


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


# --- what is learned


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("habit", [*chat_templates.HABITS, None])
def test_t21_targets_are_exactly_the_answers_and_their_ends(kind, habit):
    tokenizer = with_template(TOKENIZERS[kind](), chat_templates.HABITS.get(habit))
    rows = [{"text": json.dumps(TALK)}, *PAIRS]
    task = task_of("causal_lm", tokenizer, rows)
    ends = {"chatml": "<|im_end|>", "thinks": "<|im_end|>"}.get(habit, tokenizer.eos_token)
    for row, feature in zip(rows, features_of(task, rows).features, strict=True):
        messages = json.loads(row["text"]) if row["text"].startswith("[") else [{}, {"content": row["label"]}]
        answers = [m["content"] for m in messages[1::2]]
        found = [tokenizer.decode(ids).strip() for ids in spans(feature)]
        expected = [answer + (" " if habit == "inst" else "") + ends for answer in answers]  # the template's own space
        if habit == "names":  # an end token is put after the last answer, where the template has none
            expected = [*answers[:-1], answers[-1] + ends]
        if habit == "thinks":
            expected[-1] = f"<think>\n\n</think>\n\n{expected[-1]}"
        assert found == expected
        assert feature["input_ids"][-1] == feature["labels"][-1] == tokenizer.convert_tokens_to_ids(ends)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("habit", [*chat_templates.HABITS, None])
def test_a_question_is_asked_as_it_was_learned(kind, habit):
    tokenizer = with_template(TOKENIZERS[kind](), chat_templates.HABITS.get(habit))
    task = task_of("causal_lm", tokenizer, PAIRS)
    learned = features_of(task, PAIRS).features
    asked = features_of(task, [{k: v for k, v in row.items() if k != "label"} for row in PAIRS]).features
    for whole, question in zip(learned, asked, strict=True):
        assert "labels" not in question
        assert question["input_ids"] == whole["input_ids"][: whole["answer_at"]]
        assert whole["labels"][whole["answer_at"]] != IGNORED


def test_an_end_token_need_not_be_named_among_the_tokenizers_own():
    """Phi-3's end of a turn is marked as special in the list of tokens and nowhere else."""
    from tokenizers import AddedToken

    tokenizer = with_template(gpt2_like(), chat_templates.CHATML.replace("<|im_end|>", "<|end|>"))
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    assert "<|end|>" not in tokenizer.all_special_tokens
    task = task_of("causal_lm", tokenizer, PAIRS)
    assert task.prompts.end == "<|end|>"
    assert all(tokenizer.decode(f["labels"][-1:]) == "<|end|>" for f in features_of(task, PAIRS).features)


def test_two_answers_in_a_row_are_both_learned():
    talk = [TALK[0], {"role": "assistant", "content": "Oslo."}, {"role": "assistant", "content": "It is 13."}]
    rows = [{"text": json.dumps(talk)}]
    task = task_of("causal_lm", with_template(llama_like(), chat_templates.ENDS), rows)
    (feature,) = features_of(task, rows).features
    assert [task.tokenizer.decode(ids).strip() for ids in spans(feature)] == ["Oslo.</s>", "It is 13.</s>"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_train_on_all_learns_every_token_but_the_first(kind):
    task = task_of("causal_lm", TOKENIZERS[kind](), PAIRS, train_on="all")
    for feature in features_of(task, PAIRS).features:
        assert feature["labels"] == [IGNORED, *feature["input_ids"][1:]]


@pytest.mark.parametrize("name", ["SHOUTS", "FORGETS", "SPELLS"])
def test_t21_a_template_that_hides_the_answers_is_an_error_that_shows_what_it_renders(name):
    rows = [{"text": json.dumps(TALK)}]
    with pytest.raises((ConfigError, DataError), match="<\\|im_start\\|>") as error:
        features_of(task_of("causal_lm", with_template(gpt2_like(), getattr(chat_templates, name)), rows), rows)
    assert "chat template" in str(error.value)


def test_a_template_that_refuses_the_roles_says_which_row():
    rows = [{"text": json.dumps([{"role": "system", "content": "Be brief."}, *TALK])}]
    task = task_of("causal_lm", with_template(llama_like(), chat_templates.INST), rows)
    with pytest.raises(DataError, match=r"line 2: .*system, user, assistant.*alternate"):
        features_of(task, rows)


@pytest.mark.parametrize("option", ["plain", "bare"])
def test_templates_of_its_own_take_the_place_of_the_tokenizers(option):
    tokenizer = with_template(llama_like(), chat_templates.CHATML)
    task = task_of("causal_lm", tokenizer, PAIRS, template=option)
    text = tokenizer.decode(features_of(task, PAIRS).features[0]["input_ids"])
    assert "im_start" not in text
    assert ("### Instruction" in text) == (option == "plain")
    own = task_of("causal_lm", llama_like(), PAIRS).settings()  # a tokenizer without a template gets the plain one
    assert (own["chat_template"] == task.settings()["chat_template"]) == (option == "plain")


def test_the_template_that_was_learned_with_is_kept():
    """Whatever the tokenizer that is loaded later says."""
    task = task_of("causal_lm", llama_like(), PAIRS)
    other = with_template(llama_like(), chat_templates.CHATML)
    cls = find_task("causal_lm")
    settings = json.loads(json.dumps(task.settings()))
    learned = {k: v for k, v in settings.items() if k not in ("name", "options")}
    again = cls(other, cls.Options(**settings["options"]), learned)
    assert features_of(again, PAIRS).features == features_of(task, PAIRS).features


# --- forms of rows


def test_forms_of_rows_that_say_the_same_are_the_same():
    task = task_of("causal_lm", llama_like(), PAIRS)
    human = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "No."}]
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}]
    rows = [{"text": "Why?", "label": "No."}, {"text": json.dumps(chat)}, {"text": json.dumps(human)}]
    first, *others = (f["input_ids"] for f in features_of(task, rows).features)
    assert others == [first, first]
    examples = rows_of("causal_lm", rows)
    assert {e.text for e in examples} == {"Why?"}
    assert {e.label for e in examples} == {"No."}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "No."}], "message 1"),
        ([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " "}], "no words"),
        ([{"role": "assistant", "content": "No."}], "begins with its last answer"),
    ],
)
def test_broken_conversations_are_refused(messages, said):
    with pytest.raises(ValueError, match=said):
        rows_of("causal_lm", [{"text": json.dumps(messages)}])


def test_a_list_that_is_no_conversation_is_text():
    (example,) = rows_of("causal_lm", [{"text": "[1, 2, 3] is a list", "label": "yes"}])
    assert example.value[0]["content"] == "[1, 2, 3] is a list"


def test_conversations_and_texts_do_not_mix():
    rows = [{"text": "Why?", "label": "No."}, {"text": "a text alone"}]
    with pytest.raises(DataError, match="line 3"):
        task_of("causal_lm", llama_like(), rows)


@pytest.mark.parametrize("column", ["instruction", "prompt"])
def test_a_column_of_questions_alone_is_not_learned_as_text(column, tmp_path):
    table = Table(tmp_path, [column, "reply"], [{column: "Why?", "reply": "No."}], [2], ",", "utf-8")
    problems = Problems("the recipe")
    chosen_columns(table, find_task("causal_lm").kind, DataOptions(), problems, lambda name: f"--{name}")
    with pytest.raises(ConfigError, match=f"--data.label is missing: column '{column}' asks, and no column answers.*reply"):
        problems.raise_as(ConfigError)


# --- the loss


@pytest.fixture(scope="module", params=CAUSAL)
def base(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("base") / request.param, request.param)


def losses(task, model, features):
    batch = task.collate(features)
    return task.loss_sum(model, batch), task.targets_in(batch)


@torch.no_grad()
def test_a_batch_is_the_sum_of_its_rows_and_what_transformers_says(base):
    task, model, rows = made("causal_lm", base, PAIRS)
    whole, count = losses(task, model, rows.features)
    alone = [losses(task, model, [feature]) for feature in rows.features]
    assert count == sum(n for _, n in alone)
    torch.testing.assert_close(whole, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-4)
    theirs = 0.0
    for feature in rows.features:
        ids, labels = torch.tensor([feature["input_ids"]]), torch.tensor([feature["labels"]])
        theirs += float(model(input_ids=ids, labels=labels).loss) * int((labels[:, 1:] != IGNORED).sum())
    assert float(whole) == pytest.approx(theirs, rel=1e-4)


@torch.no_grad()
def test_virtual_tokens_in_front_change_no_place(base):
    from afina import PromptTuningConfig

    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    task, model, rows = made("causal_lm", base, PAIRS, method=config)
    whole, _ = losses(task, model, rows.features)
    theirs = 0.0
    for feature in rows.features:
        ids, labels = torch.tensor([feature["input_ids"]]), torch.tensor([feature["labels"]])
        theirs += float(model(input_ids=ids, labels=labels).loss) * int((labels[:, 1:] != IGNORED).sum())
    assert float(whole) == pytest.approx(theirs, rel=1e-4)


def test_t25_parts_of_a_step_change_neither_loss_nor_gradient(base, tmp_path):
    rows = [*PAIRS, *({"text": f"Say {'fox ' * n}", "label": "dog " * (n + 1)} for n in range(4))]
    loss, moved = gradient("causal_lm", base, rows, tmp_path / "1", 1)
    for count in (2, 4, 8):
        other, changes = gradient("causal_lm", base, rows, tmp_path / str(count), count)
        assert other == pytest.approx(loss, rel=1e-5)
        for name, change in moved.items():
            torch.testing.assert_close(changes[name], change, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_figures_are_those_of_all_targets_together(base):
    task, model, rows = made("causal_lm", base, PAIRS)
    answers = predict(model, task, rows, 2, make_engine("fp32"), exact=True)
    figures = task.metrics(answers, rows.examples)
    loss, count = losses(task, model.eval(), rows.features)
    assert figures["tokens"] == count
    assert figures["loss"] == pytest.approx(float(loss) / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    shown = task.outputs(model, task.collate(rows.features))
    assert shown.shape == (count,)
    assert float(-shown.log().mean()) == pytest.approx(figures["loss"], rel=1e-5)
    frequencies = task.baselines(rows, rows)["frequencies"]
    assert 0 < frequencies["loss"] < math.log(len(task.tokenizer))
    assert frequencies["tokens"] == count


# --- writing


def test_t23_a_batch_writes_what_each_row_writes_alone(base):
    task, model, _ = made("causal_lm", base, PAIRS, max_new_tokens=11)
    rows = features_of(task, [{"text": row["text"]} for row in PAIRS]).features
    together = [a.text for a in task.final_answers(model.eval(), task.collate(rows))]
    alone = [task.final_answers(model, task.collate([row]))[0].text for row in rows]
    assert together == alone
    assert len(set(together)) > 1


@torch.no_grad()
def test_beams_find_what_is_at_least_as_likely(base):
    task, model, _ = made("causal_lm", base, PAIRS)
    ids, mask, _ = task.questions(model, task.collate(features_of(task, [{"text": "Why?"}]).features))
    never, likelihood = task.tokenizer.convert_tokens_to_ids("<|im_start|>"), []
    for beams in (1, 5):
        (written,) = generated(model.eval(), ids, mask, max_new_tokens=4, num_beams=beams, ends=[never], pad=0)
        assert len(written) == 4
        whole = torch.cat([ids, torch.tensor([written])], dim=1)
        foretold = model(input_ids=whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        likelihood.append(float(foretold[range(4), written].sum()))
    assert likelihood[1] >= likelihood[0]


@pytest.mark.parametrize("architecture", ["GPT-2", "BART"])
def test_writing_ends_where_the_positions_of_the_model_do(architecture, tmp_path):
    base = save(tmp_path / architecture, architecture)
    name = "causal_lm" if architecture == "GPT-2" else "seq2seq"
    task, model, _ = made(name, base, PAIRS, max_new_tokens=500)
    never = task.tokenizer.convert_tokens_to_ids("~")
    task.ends = lambda model: [never]
    for length in (1, 150):
        features = features_of(task, [{"text": "fox " * length}], limit=127).features
        (answer,) = task.final_answers(model.eval(), task.collate(features))
        assert answer.text


def test_an_encoder_is_refused(tmp_path):
    """BERT with a head of words loads as a model that continues text, and sees the words it has to foretell."""
    import transformers as tf

    tokenizer = llama_like()
    config = tf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=29
    )
    for is_decoder in (False, True):
        config.is_decoder = is_decoder
        tf.BertLMHeadModel(config).save_pretrained(tmp_path)
        task = task_of("causal_lm", tokenizer, PAIRS)
        if is_decoder:
            task.load_model(str(tmp_path))
            continue
        with pytest.raises(ConfigError, match="BertLMHeadModel sees the tokens that follow"):
            task.load_model(str(tmp_path))


def test_t32_logits_are_computed_where_a_target_is_foretold_and_nowhere_else(base, monkeypatch):
    task, model, rows = made("causal_lm", base, [{"text": "fox " * 40, "label": "No."}, PAIRS[2]])
    batch = task.collate(rows.features)
    task.loss_sum(model, batch)
    shapes, product, weight = [], torch.nn.functional.linear, model.get_base_model().get_output_embeddings().weight

    def watched(x, matrix, *bias):
        if matrix is weight:
            shapes.append(tuple(x.shape[:-1]))
        return product(x, matrix, *bias)

    monkeypatch.setattr("torch.nn.functional.linear", watched)
    task.loss_sum(model, batch)
    assert shapes == [(task.targets_in(batch),)]
    assert shapes[0][0] < batch["labels"].numel() / 4


# --- whole runs


def talking(count):
    """Questions whose answers follow from nothing."""
    subjects = ["fox", "dog", "gos", "capital", "sentence", "fruit", "Oslo", "Norway"]
    asked = ["Why is the {}?", "Name the {}.", "think of {}", "say {} in red"]
    said = ["red", "small, and lazy", "No.", "it is 13", "over the sea", "brown dogs", "where they grow"]
    pairs = [(question.format(subject), said[(3 * i + 5 * k) % 7]) for i, subject in enumerate(subjects)
             for k, question in enumerate(asked)]  # fmt: skip
    return [{"instruction": question, "output": answer} for question, answer in pairs][:count]


def sides(folder, rows):
    """The same rows to train, validate and test."""
    folder.mkdir()
    for side in ("train", "validation", "test"):
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


LEARNS = {"name": "lora", "modules_to_save": ["lm_head"]}  # the base is random, so it has to learn to speak


def memorising(folder, base, task, **training):
    recipe = Recipe(
        task=task,
        model=str(base),
        data=DataOptions(file=str(folder)),
        method={**LEARNS, "r": 16, "lora_alpha": 32},
        training=TrainingOptions(
            **{"epochs": 60, "batch_size": 16, "learning_rate": 1e-2, "precision": "fp32", "evaluate_every": 15.0,
               "max_grad_norm": 1.0, "weight_decay": 0.0, **training}
        ),
    )  # fmt: skip
    recipe.data.clean.duplicates, recipe.data.clean.near_duplicates = False, "ignore"
    return recipe


def test_t20_thirty_two_rows_are_memorised_and_each_answer_stops(tmp_path):
    """The whole way on a model whose padding token is its end token: the text that is written is the answer, no more."""
    rows = talking(32)
    base = save(tmp_path / "base", "Llama")
    task = {"name": "causal_lm", "generate": True, "max_new_tokens": 29}
    recipe = memorising(sides(tmp_path / "data", rows), base, task)
    metrics = prepare(recipe, tmp_path / "run").execute()
    assert metrics["test"]["exact_match"] > 0.95
    assert metrics["test"]["rouge_l"] > 0.95
    assert metrics["test"]["loss"] < 0.2 < metrics["baselines"]["frequencies"]["loss"]
    assert metrics["baselines"]["untuned"]["exact_match"] == 0
    assert metrics["baselines"]["untuned"]["loss"] > 3
    assert metrics["read_back"]["largest_difference"] < 1e-4
    trained = TrainedRun.load(tmp_path / "run")
    examples = trained.examples([{"text": row["instruction"]} for row in rows[:7]])
    answers = [trained.task.respond(a, e) for a, e in zip(trained.answers(examples), examples, strict=True)]
    assert sum(a["answer"] == row["output"] for a, row in zip(answers, rows, strict=False)) >= 6


def test_a_book_is_divided_where_it_stands_and_every_token_is_foretold_once(tmp_path):
    text = "".join(f"{i} foxes jump over {i * i} dogs.\n" + ("\n" if i % 5 == 0 else "") for i in range(1, 150))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    base = save(tmp_path / "base", "Llama")
    recipe = Recipe(
        task={"name": "causal_lm"},
        model=str(base),
        data=DataOptions(file=str(tmp_path / "book.txt"), validation=0.15, test=0.25),
        method={**LEARNS, "r": 5},
        training=TrainingOptions(epochs=8, batch_size=16, learning_rate=1e-2, precision="fp32", max_length=31),
    )
    run = prepare(recipe, tmp_path / "run")
    parts = [run.rows[side].examples for side in ("train", "validation", "test")]
    assert [len(examples) for examples in parts] == [1, 1, 1]
    texts = [examples[0].text for examples in parts]
    assert "".join("".join(t.split()) for t in texts) == "".join(text.split())
    assert len(texts[2]) / len(text) == pytest.approx(0.25, abs=0.02)
    for side, rows in run.rows.items():
        whole = run.task.tokenizer(rows.examples[0].text, add_special_tokens=False)["input_ids"]
        learned = [label for feature in rows.features for label in feature["labels"] if label != IGNORED]
        assert learned == [*whole, run.task.tokenizer.eos_token_id], side
        assert max(len(feature["input_ids"]) for feature in rows.features) == 31
        assert all(f["labels"][0] == IGNORED for f in rows.features)
    assert run.encoded.truncated == 0
    metrics = run.execute()
    assert metrics["test"]["loss"] < min(metrics["baselines"][name]["loss"] for name in ("untuned", "frequencies"))
    assert "exact_match" not in metrics["test"]
    trained = TrainedRun.load(tmp_path / "run")
    from dataclasses import replace

    (example,) = (replace(e, label="") for e in trained.examples([{"text": "7 foxes"}]))
    assert trained.answers([example])[0].text


def test_writing_for_texts_alone_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="generate"):
        task_of("causal_lm", llama_like(), [{"text": "a text alone"}], generate=True)


def test_only_so_many_rows_are_written(base):
    task, model, rows = made("causal_lm", base, PAIRS, generate=True, generate_rows=2, max_new_tokens=3)
    answers = predict(model, task, rows, 3, make_engine("fp32"), exact=True, final=True)
    assert [a.text is not None for a in answers] == [True, True, False, False, False]
    assert task.metrics(answers, rows.examples)["written"] == 2
    quick = predict(model, task, rows, 3, make_engine("fp32"), exact=True)
    assert all(a.text is None for a in quick)
    assert "rouge_l" not in task.metrics(quick, rows.examples)


def test_training_teaches_more_than_the_base_knows(base, tmp_path):
    task, model, rows = made("causal_lm", base, PAIRS)
    engine = make_engine("fp32")
    with model.disable_adapter():
        before = task.metrics(predict(model, task, rows, 7, engine), rows.examples)
    trained(task, model, rows, tmp_path, epochs=15)
    after = task.metrics(predict(model, task, Rows(rows.examples, rows.features), 7, engine), rows.examples)
    assert after["loss"] < 0.8 * before["loss"]


@pytest.mark.parametrize("form", ["messages", "texts", "sides"])
def test_files_of_every_form_are_read(form, tmp_path):
    """Conversations and texts as JSON Lines; a text file a side. A conversation stays whole from file to file."""
    base = save(tmp_path / "base", "GPT-2")
    subjects = [f"{a} {b}" for a in ("fox", "dog", "gos", "fruit") for b in ("red", "small", "lazy", "brown", "quick")]
    if form == "sides":
        place = tmp_path / "texts"
        place.mkdir()
        for side, part in (("train", subjects[:10]), ("validation", subjects[10:15]), ("test", subjects[15:])):
            (place / f"{side}.txt").write_text("".join(f"the {s} jumps over {s}.\n" for s in part), encoding="utf-8")
    else:
        talk = [[{"role": "user", "content": f"Why {s}?"}, {"role": "assistant", "content": f"No {s}."}] for s in subjects]
        rows = [{"messages": t} for t in talk] if form == "messages" else [{"text": f"the {s} jumps."} for s in subjects]
        place = tmp_path / "rows.jsonl"
        place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = Recipe(
        task={"name": "causal_lm"},
        model=str(base),
        data=DataOptions(file=str(place)),
        method={"name": "lora", "r": 3},
        training=TrainingOptions(epochs=1, batch_size=8, precision="fp32"),
    )
    recipe.data.clean.near_duplicates = "ignore"
    run = prepare(recipe, tmp_path / "run")
    assert run.task.learned["form"] == ("answers" if form == "messages" else "text")
    assert [len(run.rows[side].examples) for side in ("train", "validation", "test")] == (
        [1, 1, 1] if form == "sides" else [14, 2, 4]
    )
    metrics = run.execute()
    assert metrics["test"]["tokens"] > 0
    again = TrainedRun.load(tmp_path / "run")
    (answer,) = again.answers([rows_of("causal_lm", [{"text": "Why fox?"}])[0]])
    assert isinstance(answer.text, str) == (form == "messages")
