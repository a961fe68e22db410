"""Tuning on preferences: what a row may be, losses by their formulas, the reference, what is kept and what is written."""

from __future__ import annotations

import gc
import json
import math
import random
from pathlib import Path

import every_task
import pytest
import torch
import transformers as tf
from tasks_made import check_parts_change_nothing, examples_of, made, trained
from tiny_bases import WORDS

from afina import LoraConfig
from afina.core.files import read_weights
from afina.data.columns import chosen_columns
from afina.data.divide import divided
from afina.data.example import UnusableError
from afina.data.options import DataOptions
from afina.data.read import read_table
from afina.errors import ConfigError, DataError, Problems, TrainingError
from afina.tasks.catalogue import find_task
from afina.tasks.generation import drawn
from afina.tasks.preferences import BAD, GOOD
from afina.tasks.reference import REFERENCE, reference
from afina.tasks.reward_functions import Told, find_rewards
from afina.training.loop import make_engine, predict
from afina.training.models import ModelSource, load_tokenizer
from afina.training.recipe import read_recipe
from afina.training.run import prepare
from afina.training.trained import TrainedRun

REWARDS = Path(__file__).with_name("rewards_made.py")
CPU = torch.device("cpu")


def pairs(count, seed=0):
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS, k=chance.randrange(3, 9))) for _ in range(3 * count)]
    return [{"text": texts[3 * i], "text_pair": texts[3 * i + 1], "label": texts[3 * i + 2]} for i in range(count)]


def moved(name, base, rows, **options):
    """A task whose adapter is no longer the identity."""
    method = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return made(name, base, rows, method=method, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return every_task.save_causal(tmp_path_factory.mktemp("base"))


# --- rows


CHAT = [{"role": "user", "content": "Who?"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "Me."}]


@pytest.mark.parametrize(
    ("better", "read"),
    [("Me.", "Me."), (json.dumps(ANSWERED), "Me."), (json.dumps(ANSWERED[1:]), "Me."), (json.dumps(ANSWERED[1]), "Me."),
     ("[not messages]", "[not messages]")],
)  # fmt: skip
def test_an_answer_is_a_text_a_message_or_a_conversation(better, read):
    for prompt in ("Who?", json.dumps(CHAT)):
        (example,) = examples_of("dpo", [{"text": prompt, "text_pair": better, "label": "You."}])
        assert example.value.answers == (read, "You.")
        assert example.value.prompt == "Who?"


def test_pairs_that_teach_nothing_are_dropped_and_told(tmp_path):
    rows = [{"prompt": f"p {WORDS[i]}", "chosen": f"c {i}", "rejected": f"r {i}"} for i in range(30)]
    rows[3]["chosen"] = rows[3]["rejected"]
    rows[7]["rejected"] = ""
    rows[11]["chosen"] = json.dumps([{"role": "assistant", "content": " "}])
    rows[13]["prompt"] = ""
    rows[17] = {**rows[17], "prompt": rows[16]["prompt"]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind, options = find_task("dpo").kind, DataOptions(file=str(path))
    table = read_table(path)
    columns = chosen_columns(table, kind, options, Problems("rows"))
    assert columns == {"text": "prompt", "text_pair": "chosen", "label": "rejected"}
    done = divided(table, kind, options, columns=columns, seed=0)
    told = "\n".join(done.lines())
    assert "1 row dropped: both answers are the same, so that neither is better (line 4)" in told
    assert "(line 8)" in told
    assert "1 row dropped: the better answer is empty (line 12)" in told
    assert "1 row dropped: the text is empty (line 14)" in told
    side = {i: name for name, chosen in done.sides.items() for i in chosen}
    lines = {example.line: side[i] for i, example in enumerate(done.examples)}
    assert len(lines) == 26
    assert lines[17] == lines[18]
    options.clean.empty = False
    with pytest.raises(DataError, match=r"both answers are the same.*\(line 4\)"):
        divided(table, kind, options, columns=columns, seed=0)


@pytest.mark.parametrize(
    ("row", "told"),
    [({"text": json.dumps(ANSWERED), "text_pair": "a", "label": "b"}, "the prompt ends with an answer"),
     ({"text": "Why?", "text_pair": json.dumps(ANSWERED), "label": "b"}, "do not begin with the prompt"),
     ({"text": "Why?", "text_pair": json.dumps(CHAT), "label": "b"}, "ends with a message of user")],
)  # fmt: skip
def test_conversations_that_do_not_fit_are_told(row, told):
    with pytest.raises(ValueError, match=told):
        examples_of("dpo", [row])


def test_judgements_are_read_as_people_write_them():
    said = {"true": GOOD, "1": GOOD, "Good": GOOD, "False": BAD, "0": BAD, "down": BAD}
    for text, label in said.items():
        (example,) = examples_of("kto", [{"text": "p", "text_pair": "a", "label": text}])
        assert example.label == label
        assert example.group == "p"
    with pytest.raises(ValueError, match="'maybe' is no judgement; expected true or false"):
        examples_of("kto", [{"text": "p", "text_pair": "a", "label": "maybe"}])
    with pytest.raises(UnusableError, match="empty"):
        examples_of("kto", [{"text": "p", "text_pair": "", "label": "1"}])


def test_a_prompt_that_is_cut_is_cut_alike_for_both_answers(base):
    rows = [{"text": " ".join(WORDS), "text_pair": "w1 w2", "label": "w3 w4 w5 w6 w7 w8"}]
    task, _, _ = made("dpo", base, rows, template="bare")
    (feature,) = task.encode(examples_of("dpo", rows), 19, 61).features
    at = feature["answer_at"]
    assert feature["input_ids"][:at] == feature["pair_ids"][:at]
    assert task.tokenizer.decode(feature["input_ids"][at:]) == "w1 w2<|endoftext|>".replace("<", " <")
    assert max(len(feature["input_ids"]), len(feature["pair_ids"])) == 19
    assert task.encode(examples_of("dpo", rows), 19, 61).truncated == 1


# --- losses


def by_hand(task, model, rows):
    """Log-probabilities of policy and reference, from whole logits, one answer at a time."""
    found = []
    for disabled in (False, True):
        values = []
        for feature in rows.features:
            for key in ("input_ids", "pair_ids")[: 2 if "pair_ids" in feature else 1]:
                ids, at = torch.tensor([feature[key]]), feature["answer_at"]
                with model.disable_adapter() if disabled else torch.enable_grad():
                    scores = model(input_ids=ids).logits[0].double().log_softmax(-1)
                values.append(sum(scores[place - 1, ids[0, place]] for place in range(at, ids.shape[1])))
        found.append(torch.stack(values))
    return found


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_the_loss_of_pairs_is_its_formula(loss, base):
    smoothing = 0.2 if loss == "sigmoid" else 0.0
    task, model, rows = moved("dpo", base, pairs(5), loss=loss, beta=0.3, label_smoothing=smoothing)
    model.eval()
    own, other = by_hand(task, model, rows)
    counts = torch.tensor([len(f[k]) - f["answer_at"] for f in rows.features for k in ("input_ids", "pair_ids")])
    ratio = own - other.detach()
    better, worse = (ratio / counts if loss == "ipo" else ratio).view(-1, 2).unbind(1)
    x = better - worse
    wanted = {
        "sigmoid": -(1 - smoothing) * torch.log(torch.sigmoid(0.3 * x)) - smoothing * torch.log(torch.sigmoid(-0.3 * x)),
        "ipo": (x - 1 / 0.6) ** 2, "hinge": (1 - 0.3 * x).clamp(min=0),
    }[loss].sum()  # fmt: skip
    batch = task.collate(rows.features)
    got = task.loss_sum(model, batch)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, two in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(one, two.float(), rtol=1e-3, atol=1e-5)
    figures = task.metrics(task.answers(model, batch), rows.examples)
    assert figures["loss"] == pytest.approx(wanted.item() / 5, rel=1e-4)
    apart = ratio.view(-1, 2)[:, 0] - ratio.view(-1, 2)[:, 1]
    assert figures["margin"] == pytest.approx(0.3 * apart.mean().item(), rel=1e-4)
    low, high = figures["accuracy_interval"]
    assert low < figures["accuracy"] < high or figures["accuracy"] in (0.0, 1.0)


def test_the_loss_of_odds_is_its_formula(base):
    task, model, rows = moved("orpo", base, pairs(5), beta=0.7)
    own, _ = by_hand(task, model.eval(), rows)
    counts = torch.tensor([len(f[k]) - f["answer_at"] for f in rows.features for k in ("input_ids", "pair_ids")])
    better, worse = (own / counts).view(-1, 2).unbind(1)
    odds = lambda mean: mean - torch.log(1 - mean.exp())
    wanted = (-better - 0.7 * torch.log(torch.sigmoid(odds(better) - odds(worse)))).sum()
    torch.testing.assert_close(task.loss_sum(model, task.collate(rows.features)).double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_loss_of_judgements_is_its_formula(base):
    rows = [{"text": row["text"], "text_pair": row["text_pair"], "label": str(i % 2)} for i, row in enumerate(pairs(5))]
    task, model, encoded = moved("kto", base, rows, beta=0.3, desirable_weight=1.3)
    own, other = by_hand(task, model.eval(), encoded)
    mixed = [
        {**f, "input_ids": [*f["input_ids"][: f["answer_at"]], *g["input_ids"][g["answer_at"] :]]}
        for f, g in zip(encoded.features, [*encoded.features[1:], encoded.features[0]], strict=True)
    ]
    width = max(len(f["input_ids"]) for f in encoded.features)
    mixed = [{**f, "input_ids": f["input_ids"][:width]} for f in mixed]
    strayed = torch.sub(*by_hand(task, model, type(encoded)(encoded.examples, mixed)))
    z = strayed.mean().clamp(min=0).detach()
    ratio = own - other
    good = torch.tensor([e.label == GOOD for e in encoded.examples])
    wanted = torch.where(good, 1.3 * (1 - torch.sigmoid(0.3 * (ratio - z))), 1 - torch.sigmoid(0.3 * (z - ratio))).sum()
    torch.testing.assert_close(task.loss_sum(model, task.collate(encoded.features)).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("dpo", {}), ("kto", {})])
def test_t25_parts_change_neither_loss_nor_gradient(name, options, base, tmp_path):
    rows = pairs(11)
    if name == "kto":
        rows = [{**row, "label": str(i % 3 > 0)} for i, row in enumerate(rows)]
    check_parts_change_nothing(name, base, rows, tmp_path, **options)


# --- the reference


def test_t31_a_new_adapter_begins_at_the_base(base, tmp_path):
    """With dropout in the base, too: in training its noise would be taken for a difference."""
    config = tf.GPT2Config.from_pretrained(base, resid_pdrop=0.4, embd_pdrop=0.3, attn_pdrop=0.2)
    noisy = tmp_path / "noisy"
    tf.GPT2LMHeadModel.from_pretrained(base, config=config).save_pretrained(noisy)
    tf.AutoTokenizer.from_pretrained(base).save_pretrained(noisy)
    task, model, rows = made("dpo", noisy, pairs(7))
    model.train()
    loss = task.loss_sum(model, task.collate(rows.features))
    assert loss.item() / 7 == pytest.approx(math.log(2), abs=1e-6)
    figures = task.metrics(predict(model, task, rows, 4, make_engine("fp32")), rows.examples)
    assert figures["kl"] == figures["margin"] == 0.0
    assert figures["accuracy"] == 0.5


def test_what_the_reference_makes_of_a_row_is_computed_once(base, tmp_path):
    task, model, rows = made("dpo", base, pairs(13))
    asked = []
    own = task.referred
    task.referred = lambda model, batch: asked.append("reference" in batch) or own(model, batch)
    trained(task, model, rows, tmp_path, epochs=3, batch_size=5)
    computed = asked.count(False)
    assert computed == 2  # two batches of ten rows, before the first step
    assert asked.count(True) == 9
    kept = json.loads((tmp_path / "checkpoints" / "reference.json").read_text())
    with reference(model):
        wanted = task.log_probs(model, task.collate(rows.features))[0].view(2, -1).T
    torch.testing.assert_close(torch.tensor(kept["answers"]).float(), wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run of plain tuning, and one of preferences that starts from its adapter."""
    folder = tmp_path_factory.mktemp("started")
    prepare(every_task.case("causal_lm", folder / "first", rows=23, epochs=1), folder / "sft").execute()
    recipe = every_task.case("dpo", folder / "second", epochs=2)
    recipe.model, recipe.start, recipe.method = "minilm", str(folder / "sft"), {"name": "lora"}
    run = prepare(recipe, folder / "dpo")
    first = predict(run.model, run.task, run.rows["test"], 8, make_engine("fp32"), exact=True)
    return folder, run, run.task.metrics(first, run.rows["test"].examples), run.execute()


def test_t31_a_run_that_starts_from_an_adapter_is_measured_against_it(started):
    folder, run, before, metrics = started
    assert before["kl"] == before["margin"] == 0.0
    assert metrics["test"]["kl"] > 0
    assert run.recipe.model == str(folder / "first" / "base")
    assert run.recipe.method["r"] == 3
    start, kept, made_ = (
        read_weights(folder / place / "adapter_model.safetensors")
        for place in ("sft/adapter", "dpo/reference", "dpo/adapter")
    )
    assert all(torch.equal(start[key], kept[key]) for key in start.keys() | kept.keys())
    assert any(not torch.equal(start[key], made_[key]) for key in start)
    assert not (folder / "dpo" / "adapter" / REFERENCE).exists()
    again = TrainedRun.load(folder / "dpo")
    figures = again.task.metrics(again.answers(run.rows["test"].examples), run.rows["test"].examples)
    assert figures["margin"] == pytest.approx(metrics["test"]["margin"], abs=1e-4)
    assert figures["kl"] == pytest.approx(metrics["test"]["kl"], abs=1e-5)


def test_a_run_that_starts_from_an_adapter_is_repeated_from_its_recipe(started, tmp_path):
    folder, _, _, metrics = started
    again = prepare(read_recipe(folder / "dpo" / "recipe.yaml"), tmp_path / "again").execute()
    assert again["test"] == metrics["test"]


def test_what_cannot_be_started_from_is_told(started, tmp_path):
    folder, *_ = started
    recipe = every_task.case("dpo", folder / "second")
    recipe.start, recipe.method = str(folder / "sff"), {"name": "lora"}
    with pytest.raises(ConfigError, match=r"there is no such folder. Did you mean 'sft'"):
        prepare(recipe, tmp_path / "run")
    recipe.start, recipe.method = str(folder / "first"), {"name": "lora"}
    with pytest.raises(ConfigError, match=r"a finished run or an adapter folder; it holds base, rows.jsonl"):
        prepare(recipe, tmp_path / "run")
    recipe.start, recipe.method = str(folder / "sft"), {"name": "lora", "r": 7}
    with pytest.raises(ConfigError, match="was made with 3; leave it out"):
        prepare(recipe, tmp_path / "run")
    recipe.start, recipe.model = None, str(folder / "sft")
    with pytest.raises(ConfigError, match="is a run, not a base model; to train its adapter further say --start"):
        prepare(recipe, tmp_path / "run")


def test_memory_holds_one_copy_of_the_base(base, tmp_path):
    """Whatever tensors are alive in the middle of training: the base once, and otherwise what belongs to the adapter."""

    def alive():
        return {id(t): t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}

    before = alive()
    task, model, rows = made("dpo", base, pairs(13))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    places, shapes = {p.data_ptr() for p in frozen}, {tuple(p.shape) for p in frozen if p.dim() == 2}
    copies = []

    def look(line):
        new = [t for key, t in alive().items() if before.get(key) is not t and tuple(t.shape) in shapes]
        copies.append([tuple(t.shape) for t in new if t.data_ptr() not in places])

    trained(task, model, rows, tmp_path, look, epochs=1)
    assert copies
    assert not any(copies)


# --- rewards


@pytest.mark.parametrize(
    ("asked", "told"),
    [("", "task.reward is missing: .*--reward rewards.py:mentions_a_dog"),
     ("rewards_made.py", "expected FILE.py:function or the folder of a run"),
     ("{here}/rewards_mode.py:words", "there is no file .*Did you mean 'rewards_made.py'"),
     ("{here}/rewards_made.py:word", "defines no function 'word'. Did you mean 'words'"),
     ("{here}/rewards_made.py:asks_more", r"asks_more\(completions, mood\) cannot be called; name its arguments among"),
     ("{here}", "is no finished run")],
)  # fmt: skip
def test_rewards_that_are_not_there_are_told(asked, told):
    with pytest.raises(ConfigError, match=told):
        find_rewards(asked.format(here=REWARDS.parent))


@pytest.mark.parametrize(
    ("name", "told"),
    [("fails", r"fails failed: IndexError: list index out of range \(rewards_made.py, line \d+\); the first .*'w1'"),
     ("too_few", "returned 1 rewards for 2 completions"),
     ("no_number", "returned nan for the completion 'w1'"),
     ("words", r"returned \['good', 'good'\]; expected a list of 2 numbers")],
)  # fmt: skip
def test_rewards_that_fail_are_told(name, told):
    rewards = find_rewards(f"{REWARDS}:{name}")
    with pytest.raises(TrainingError, match=told):
        rewards([Told("p", "", ())] * 2, ["w1", "w2"], CPU)


def test_rewards_are_summed_and_a_ranker_is_one(tmp_path):
    prepare(every_task.case("reward", tmp_path / "ranker", rows=29, epochs=1), tmp_path / "run").execute()
    told = [Told("w1 w2", "", ({"role": "user", "content": "w1 w2"},))] * 2
    ranked = find_rewards(str(tmp_path / "run"))(told, ["w3", "w1 w1"], CPU)
    run = TrainedRun.load(tmp_path / "run")
    rows = run.asked([{"text": "w1 w2", "text_pair": text} for text in ("w3", "w1 w1")])
    assert ranked == pytest.approx([answer[0] for answer in run.answers(rows)], abs=1e-5)
    both = find_rewards(f"{tmp_path / 'run'}, {REWARDS}:repeats_first")(told, ["w3", "w1 w1"], CPU)
    assert both == pytest.approx([ranked[0], ranked[1] + 2], abs=1e-5)


# --- writing and learning from it


def test_what_is_drawn_follows_the_model_and_not_the_rows_beside(base):
    model = tf.AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.tensor([[5, 7, 11]])
    share = torch.softmax(model(input_ids=ids).logits[0, -1].float() / 1.7, -1)
    count = 3001
    chances = ((torch.arange(count) + 0.5) / count)[:, None]
    rows = ids.expand(count, 3)
    options = {"temperature": 1.7, "ends": [1], "pad": 0}
    first = torch.tensor([row[0] for row in drawn(model, rows, torch.ones_like(rows), chances, **options)])
    found = torch.bincount(first, minlength=len(share)).float() / count
    torch.testing.assert_close(found, share, rtol=0.0, atol=2 / count)
    some = torch.rand(7, 9, generator=torch.Generator().manual_seed(3))
    mixed = torch.tensor([[0, 5, 7], [5, 7, 11], [3, 2, 9], [0, 0, 4], [9, 9, 9], [5, 7, 11], [2, 8, 6]])
    mask = (mixed != 0).long()
    together = drawn(model, mixed, mask, some, **options)
    for i in range(7):
        (alone,) = drawn(model, mixed[i : i + 1], mask[i : i + 1], some[i : i + 1], **options)
        assert alone == together[i]
        assert 1 not in alone[:-1]


def rewarding(folder, **options):
    recipe = every_task.case("grpo", folder, rows=31, epochs=3, batch_size=5)
    recipe.task |= options
    return recipe


def losses_and_rewards(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["loss"], line.get("reward")) for line in lines if "loss" in line]


def test_t03_answers_that_are_learned_from_again_are_the_same_after_a_kill(tmp_path):
    recipe = rewarding(tmp_path, updates=3, clip=0.01)
    recipe.training.checkpoint_every, recipe.training.epochs, recipe.training.learning_rate = 1, 1, 0.05
    prepare(recipe, tmp_path / "whole").execute()
    whole = losses_and_rewards(tmp_path / "whole")
    assert [reward is not None for _, reward in whole] == [True, False, False] * (len(whole) // 3)
    clipped = [json.loads(line).get("clipped") for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert clipped[0] == 0.0
    assert max(value or 0.0 for value in clipped) > 0.05

    def die(line):
        if line.get("step") == 5 and "loss" in line:
            raise MemoryError

    with pytest.raises(MemoryError):
        prepare(recipe, tmp_path / "run").execute(die)
    prepare(recipe, tmp_path / "run", resume=True).execute()
    assert losses_and_rewards(tmp_path / "run") == whole


def test_the_reward_rises_several_times_over(tmp_path):
    recipe = rewarding(tmp_path, group=8, beta=0.01, max_new_tokens=7)
    recipe.training.epochs, recipe.training.learning_rate = 12, 0.02
    metrics = prepare(recipe, tmp_path / "run").execute()
    before = metrics["baselines"]["untuned"]["reward"]
    assert metrics["test"]["reward"] > 2 * before > 0
    rewards = [reward for _, reward in losses_and_rewards(tmp_path / "run")]
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])


def notices(task, *steps):
    """What is told of steps with these shares of prompts whose answers are alike in reward."""
    noted = ({} if even is None else {"even": even, "reward": 0.25} for even in steps)
    return [task.noticed(i, figures, last=i == len(steps)) for i, figures in enumerate(noted, 1)]


def test_rewards_that_tell_nothing_apart_are_told_at_once_and_at_the_end(base):
    def task():
        return find_task("grpo")(load_tokenizer(ModelSource(str(base), str(base), str(base))))

    assert notices(task(), *[0.99] * 11) == [[]] * 11
    first, last = [told for told in notices(task(), 1.0, None, 1.0, 1.0, None, 1.0, 1.0, 1.0) if told]
    assert first[0].startswith("in the 5 steps up to step 7 all answers to a prompt got the same reward (0.25 on average)")
    assert last[0].startswith("in 6 of 6 steps all answers")
    assert "the model has learned nothing" in last[0]
    (only,) = [told for told in notices(task(), 0.5, *[1.0] * 5, 0.5, *[1.0] * 4) if told][1:]
    assert only[0].startswith("in 9 of 11 steps all answers")
    whole, begun, again = task(), task(), task()
    assert notices(whole, *[1.0] * 6, 0.0, *[1.0] * 6)[:-1].count([]) == 11
    notices(begun, *[1.0] * 3, 0.0)
    again.keep([begun.kept()])
    assert (again.writing, again.even, again.stretch) == (4, 3, 0)
    assert begun.untaught == ""
    notices(begun := task(), 1.0)
    assert begun.untaught == "in all 1 steps so far all answers to a prompt got the same reward"


def test_rewards_that_seldom_differ_are_a_finding_of_the_run(tmp_path):
    recipe = rewarding(tmp_path, group=3, max_new_tokens=3, beta=0.0, reward=f"{REWARDS}:at_first")
    recipe.training.epochs = 2
    run, said = prepare(recipe, tmp_path / "run"), []
    found = run.execute(said.append)["train"]["findings"]
    assert [line["said"] for line in said if line.get("said") in found] == found
    assert len(found) == 2
    assert [line["even"] for line in said if "even" in line] == [0.0, *[1.0] * 9]
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(sentence in page for sentence in found)


@pytest.mark.parametrize("decay", [0.01, 0.0])
def test_t10_rewards_that_never_differ_stop_the_run(decay, tmp_path):
    recipe = rewarding(tmp_path, group=3, max_new_tokens=3, beta=0.0, reward=f"{REWARDS}:always")
    recipe.training.epochs, recipe.training.weight_decay = 2, decay  # which moves weights, but teaches nothing
    with pytest.raises(TrainingError, match=r"in the first 10 steps.* all answers to a prompt got the same reward"):
        prepare(recipe, tmp_path / "run").execute()


def test_a_model_without_room_for_an_answer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"task.max_new_tokens=60: the model takes 61 tokens, so that 1 would be left"):
        prepare(rewarding(tmp_path, max_new_tokens=60), tmp_path / "run")
    recipe = rewarding(tmp_path)
    recipe.distributed.engine = "fsdp2"
    with pytest.raises(ConfigError, match="needs whole weights in every process; take ddp"):
        prepare(recipe, tmp_path / "run")


def test_options_that_say_nothing_are_refused(base):
    with pytest.raises(ConfigError, match=r"task.label_smoothing=0.1 belongs to task.loss=sigmoid"):
        made("dpo", base, pairs(3), loss="hinge", label_smoothing=0.1)
