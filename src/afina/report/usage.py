"""How to load and use the adapter: lines to copy into a terminal or a Python file, for each task."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from afina.report.folder import RunFolder
from afina.report.markup import Markup, el
from afina.report.preferred import POLICIES

__all__ = ["command_lines", "python_lines", "usage"]


def command_lines(run: RunFolder, folder: Path) -> str:
    """What to type in a terminal."""
    name = shlex.quote(str(folder))
    if run.task == "dreambooth":
        return f"afina export {name} --format diffusers\nafina export {name} --format kohya\nafina report {name}"
    texts = '--text "..."' if "text" in run.data["columns"] else "--file FILE"
    if run.task == "reward":
        texts = '--text "..." --text-pair "..."'
    elif run.task in POLICIES:
        pass
    elif "boxes" in run.data["columns"]:
        texts = "--data new.jsonl --output answered.csv"
    elif run.task in ("question_answering", "sentence_similarity") or "text_pair" in run.data["columns"]:
        texts = f"--data new.csv --output {'answered' if run.task != 'sentence_similarity' else 'scored'}.csv"
    lines = [
        f"afina predict {name} {texts}",
        f"afina predict {name} --data new.csv --output answered.csv",
        f"afina evaluate {name} --data labelled.csv",
        f"afina report {name}",
    ]
    return "\n".join(dict.fromkeys(lines[1:] if texts.startswith("--data") else lines))


def python_lines(run: RunFolder, folder: str | None = None) -> str:
    """The adapter on its base, with transformers alone beside afina; `folder` is where the adapter lies."""
    if run.task == "dreambooth":
        return _drawing(run, folder or str(run.path / "adapter"))
    made = _TASKS.get(run.task)
    if made is None:
        return ""
    auto, options, body = made(run)
    of = next((kind for kind in ("AutoImageProcessor", "AutoFeatureExtractor", "AutoProcessor") if kind in body), "")
    base = str(run.adapter.get("base_model_name_or_path") or run.recipe["model"])
    folder = folder or str(run.path / "adapter")
    loaded = ", ".join([repr(base), *options])
    reader = f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n\n"
    return f"""import torch
from transformers import {auto}, {of or "AutoTokenizer"}

from afina import PeftModel  # or from peft, where it has the method

base = {auto}.from_pretrained({loaded})
model = PeftModel.from_pretrained(base, {folder!r}).eval()
{body.replace(_FOLDER, repr(folder)) if of else reader + body}"""


_FOLDER = "FOLDER"  # stands in lines for the folder of the adapter


def _drawing(run: RunFolder, folder: str) -> str:
    if "diffusers" not in run.metrics:
        return ""
    prompt = run.recipe["task"].get("instance_prompt", "...")
    return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({str(run.recipe["model"])!r})
pipeline.load_lora_weights({folder!r})  # needs peft
pipeline({prompt!r}).images[0].save("picture.png")"""


Lines = tuple[str, list[str], str]  # the class that loads the base, its options, and what to do with it


def _inputs(run: RunFolder, texts: str = '"..."') -> str:
    return f"""batch = tokenizer({texts}, return_tensors="pt", truncation=True, max_length={run.data.get("max_length")})
with torch.no_grad():
    """


def _texts(run: RunFolder) -> str:
    return '"...", "..."' if "text_pair" in run.data["columns"] else '"..."'


def _temperature(run: RunFolder) -> str:
    temperature = run.metrics["task"].get("temperature")
    return f" / {temperature!r}" if temperature else ""


def _classes(run: RunFolder) -> Lines:
    return (
        "AutoModelForSequenceClassification",
        [f"num_labels={len(run.labels)}"],
        f"""labels = {run.labels!r}
{_inputs(run, _texts(run))}shares = torch.softmax(model(**batch).logits[0]{_temperature(run)}, -1)
print(dict(zip(labels, shares.tolist())))""",
    )


def _pictures(run: RunFolder) -> Lines:
    return (
        "AutoModelForImageClassification",
        [f"id2label={dict(enumerate(run.labels))!r}"],
        f"""from afina.data.pictures import read_picture  # upright, RGB, transparent parts on white

processor = AutoImageProcessor.from_pretrained({_FOLDER}, backend="pil")
batch = processor(read_picture("..."), return_tensors="pt")
with torch.no_grad():
    shares = torch.softmax(model(**batch).logits[0]{_temperature(run)}, -1)
print(dict(zip({run.labels!r}, shares.tolist())))""",
    )


def _sounds(run: RunFolder) -> Lines:
    return (
        "AutoModelForAudioClassification",
        [f"id2label={dict(enumerate(run.labels))!r}"],
        f"""from afina.data.sounds import read_sound  # one channel, at the rate asked for

extractor = AutoFeatureExtractor.from_pretrained({_FOLDER})
rate = extractor.sampling_rate
batch = extractor(read_sound("...", rate), sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
    shares = torch.softmax(model(**batch).logits[0]{_temperature(run)}, -1)
print(dict(zip({run.labels!r}, shares.tolist())))""",
    )


def _speech(run: RunFolder) -> Lines:
    task = run.metrics["task"]
    most = task["options"]["max_new_tokens"]
    read = f"""from afina.data.sounds import read_sound  # one channel, at the rate asked for

processor = AutoProcessor.from_pretrained({_FOLDER})
extractor, tokenizer = processor.feature_extractor, processor.tokenizer
rate = extractor.sampling_rate
batch = extractor(read_sound("...", rate), sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
"""
    if "begin" not in task:
        size = len(task.get("vocabulary", ()))
        return (
            "AutoModelForCTC",
            [f"vocab_size={size}", "ignore_mismatched_sizes=True"] if size else [],
            f"""{read}    best = model(**batch).logits[0].argmax(-1)
print(tokenizer.decode(best))  # repetitions and nothings are taken out""",
        )
    return (
        "AutoModelForSpeechSeq2Seq",
        [],
        f"""from transformers import GenerationMixin  # a checkpoint's own way of writing may guess language and task

{read}    begin = torch.tensor([{task["begin"]!r}])
    made = GenerationMixin.generate(base, **batch, decoder_input_ids=begin, max_new_tokens={most})
print(tokenizer.decode(made[0], skip_special_tokens=True))""",
    )


def _segments(run: RunFolder) -> Lines:
    return (
        "AutoModelForSemanticSegmentation",
        [f"id2label={dict(enumerate(run.labels))!r}"],
        f"""from afina.data.pictures import read_picture  # upright, RGB, transparent parts on white

processor = AutoImageProcessor.from_pretrained({_FOLDER}, backend="pil")
batch = processor(read_picture("..."), return_tensors="pt")
with torch.no_grad():
    scores = model(**batch).logits
scores = torch.nn.functional.interpolate(scores, size=batch["pixel_values"].shape[-2:], mode="bilinear")
mask = scores[0].argmax(0)  # the number of a class for every pixel
shares = mask.flatten().bincount(minlength={len(run.labels)}) / mask.numel()
print(dict(zip({run.labels!r}, shares.tolist())))""",
    )


def _several(run: RunFolder) -> Lines:
    thresholds = run.metrics["task"].get("thresholds") or [0.5] * len(run.labels)
    known = {label: round(float(t), 6) for label, t in zip(run.labels, thresholds, strict=True)}
    return (
        "AutoModelForSequenceClassification",
        [f"num_labels={len(run.labels)}"],
        f"""thresholds = {known!r}  # a label is answered from there on
{_inputs(run, _texts(run))}shares = torch.sigmoid(model(**batch).logits[0]{_temperature(run)}).tolist()
print([label for label, share in zip(thresholds, shares) if share >= thresholds[label]])""",
    )


def _number(run: RunFolder) -> Lines:
    task = run.metrics["task"]
    return (
        "AutoModelForSequenceClassification",
        ["num_labels=1"],
        f"""{_inputs(run, _texts(run))}standard = model(**batch).logits[0, 0].item()
print(standard * {task["deviation"]!r} + {task["mean"]!r})  # the model answers in standard deviations from the mean""",
    )


_PIECES = """begun = first_pieces(text, spans, batch.pop("offset_mapping")[0].tolist())  # which word a piece begins
with torch"""


def _tags(run: RunFolder) -> Lines:
    return (
        "AutoModelForTokenClassification",
        [f"num_labels={len(run.labels)}"],
        f"""from afina.tasks.words import first_pieces, joined

tags, words = {run.labels!r}, ["A", "list", "of", "words"]
text, spans = joined(words)
{_inputs(run, "text, return_offsets_mapping=True").replace("with torch", _PIECES)}best = model(**batch).logits[0].argmax(-1)
print([(words[word], tags[tag]) for word, tag in zip(begun, best.tolist()) if word >= 0])""",
    )


def _boxed(run: RunFolder) -> Lines:
    task = run.metrics["task"]
    looks = task.get("family") == "layoutlmv3" and task["options"]["pictures"]
    end = "\nbbox[-1] = [1000] * 4  # of what ends the words" if task.get("family") == "layoutlm" else ""
    imported = "from transformers import AutoTokenizer\n\nfrom afina.data.pictures import read_picture\n" if looks else ""
    reader = ""
    if looks:
        reader = f"""
tokenizer = AutoTokenizer.from_pretrained({_FOLDER})
processor = AutoImageProcessor.from_pretrained({_FOLDER}, backend="pil", apply_ocr=False)"""
    seen = 'batch |= processor(read_picture("..."), return_tensors="pt")  # the page\n' if looks else ""
    return (
        "AutoModelForTokenClassification",
        [f"num_labels={len(run.labels)}"],
        f"""{imported}from afina.tasks.entities import Scheme, legal_path
from afina.tasks.words import first_seen, joined, words_of_pieces
{reader}
tags, words = {run.labels!r}, ["A", "list", "of", "words"]
boxes = [[0, 0, 1000, 1000]] * len(words)  # of each word: x0, y0, x1, y1, in thousandths of the page
text, spans = joined(words)
pieces = tokenizer.backend_tokenizer.encode(text)  # longer pages: in windows
inside = words_of_pieces(text, spans, pieces.offsets)  # which word a piece is of
bbox = [boxes[word] if word >= 0 else [0] * 4 for word in inside]{end}
batch = {{"input_ids": torch.tensor([pieces.ids]), "bbox": torch.tensor([bbox])}}
{seen}with torch.no_grad():
    shares = torch.softmax(model(**batch).logits[0], -1)
first = [(place, word) for place, word in enumerate(first_seen(inside)) if word >= 0]
best = legal_path(shares[[place for place, _ in first]].numpy(), tags, Scheme({run.test.get("scheme", "plain")!r}))
print([(words[word], tags[tag]) for (_, word), tag in zip(first, best)])""",
    )


def _span(run: RunFolder) -> Lines:
    return (
        "AutoModelForQuestionAnswering",
        [],
        """question, context = "...?", "..."
batch = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)  # longer contexts: in windows
offsets = batch.pop("offset_mapping")[0]
inside = torch.tensor([side == 1 for side in batch.sequence_ids(0)])
with torch.no_grad():
    scores = model(**batch)
start, end = (s[0].masked_fill(~inside, -torch.inf) for s in (scores.start_logits, scores.end_logits))
both = start[:, None] + end[None, :]
both = both.masked_fill(torch.ones_like(both).tril(-1).bool(), -torch.inf)  # no answer ends before it begins
first, last = divmod(both.argmax().item(), len(start))
print(context[offsets[first][0] : offsets[last][1]])""",
    )


def _reranked(run: RunFolder) -> Lines:
    length = run.data.get("max_length")
    return (
        "AutoModelForSequenceClassification",
        ["num_labels=1"],
        f"""query, passages = "...", ["..."]
batch = tokenizer(
    [query] * len(passages), passages, return_tensors="pt", padding=True, truncation=True, max_length={length}
)
with torch.no_grad():
    scores = torch.sigmoid(model(**batch).logits[:, 0]).tolist()
print(sorted(zip(scores, passages), reverse=True))  # the best passage comes first""",
    )


def _vectors(run: RunFolder) -> Lines:
    pooling = run.metrics["task"].get("options", {}).get("pooling", "auto")
    base = str(run.adapter.get("base_model_name_or_path") or run.recipe["model"])
    found = f"find_pooling({base!r}, base.config)" if pooling == "auto" else repr(pooling)
    return (
        "AutoModel",
        [],
        f"""from afina.tasks.pooling import find_pooling, pooled

batch = tokenizer(["...", "..."], return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
vectors = pooled(hidden, batch["attention_mask"], {found})
print(float(vectors[0] @ vectors[1]))  # how alike the two texts are""",
    )


def _continued(run: RunFolder) -> Lines:
    task = run.metrics["task"]
    most = task.get("options", {}).get("max_new_tokens", 128)
    temperature = task.get("options", {}).get("temperature")
    way = f"do_sample=True, temperature={temperature}, top_k=0" if temperature else "do_sample=False"
    if task.get("form") == "text" or task.get("template") == "none":
        asked = 'batch = tokenizer("...", return_tensors="pt", return_token_type_ids=False)'
    else:
        asked = (
            'messages = [{"role": "user", "content": "..."}]\n'
            "batch = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    return (
        "AutoModelForCausalLM",
        [],
        f"""{asked}
with torch.no_grad():
    made = model.generate(**batch, max_new_tokens={most}, {way}, eos_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(made[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))""",
    )


def _ranked(run: RunFolder) -> Lines:
    if run.metrics["task"].get("form") == "conversation":
        asked = (
            'messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]\n'
            "text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip().removesuffix(tokenizer.pad_token)\n"
            'batch = tokenizer(text, add_special_tokens=False, return_tensors="pt")'
        )
    else:
        asked = 'batch = tokenizer(prompt, answer, return_tensors="pt", truncation=True)'
    return (
        "AutoModelForSequenceClassification",
        ["num_labels=1"],
        f"""prompt, answer = "...", "..."
{asked}
with torch.no_grad():
    print(model(**batch).logits[0, 0].item())  # higher for the better of several answers to one prompt""",
    )


def _rewritten(run: RunFolder) -> Lines:
    most = run.metrics["task"].get("options", {}).get("max_new_tokens", 128)
    prefix = run.metrics["task"].get("options", {}).get("prefix", "") or ""
    return (
        "AutoModelForSeq2SeqLM",
        [],
        f"""{_inputs(run, repr(f"{prefix}..."))}made = model.generate(**batch, max_new_tokens={most}, do_sample=False)
print(tokenizer.decode(made[0], skip_special_tokens=True))""",
    )


_TASKS: dict[str, Callable[[RunFolder], Lines]] = {
    "audio_classification": _sounds,
    "causal_lm": _continued,
    "document_token_classification": _boxed,
    "image_classification": _pictures,
    **dict.fromkeys(POLICIES, _continued),
    "reward": _ranked,
    "multi_label_classification": _several,
    "question_answering": _span,
    "regression": _number,
    "reranking": _reranked,
    "sentence_similarity": _vectors,
    "semantic_segmentation": _segments,
    "seq2seq": _rewritten,
    "sequence_classification": _classes,
    "speech_recognition": _speech,
    "token_classification": _tags,
}


def usage(run: RunFolder) -> Markup:
    """Both, to be selected with one click each."""
    lines = python_lines(run)
    return el(
        "div",
        el("h3", "In a terminal"),
        el("pre", el("code", command_lines(run, run.path)), tabindex="0"),
        *((el("h3", "In Python"), el("pre", el("code", lines), tabindex="0")) if lines else ()),
        el(
            "p",
            "To repeat the run: ",
            el("code", f"afina train {shlex.quote(str(run.path / 'recipe.yaml'))} --output ANOTHER"),
        ),
    )
