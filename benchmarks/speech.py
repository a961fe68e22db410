"""Spoken digits by a small model, and nine sentences through Whisper's architecture in int8.

    python benchmarks/speech.py --data ../shared/data/audio_speech --tokenizer ../shared/data/tokenizers/whisper
    python benchmarks/speech.py --markdown docs/benchmarks.md      render what was measured last

The first writes benchmarks/results/speech.json. `--only digits` or `--only whisper` measures one of both.

Digits: 240 recordings of ten digits by six speakers, four takes each. No trained model is taken: an encoder of Whisper's
architecture, made small, is trained whole on them from random weights. Measured on takes that were not heard, and on
speakers that were not heard; 20 recordings of such a speaker then tune it with LoRA.

Whisper: random weights, stored as int8 and frozen; LoRA and the norms before the outputs learn nine sentences by heart. That
shows that gradients come through the int8 base to every adapter, and that what is written is what was trained.
"""

from __future__ import annotations

import base64
import csv
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from classifier import Clock, quiet
from harness import about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "speech.json"
PACKAGES = ("afina", "bitsandbytes", "jiwer", "soundfile", "torch", "transformers")
WHOLE = {"epochs": 120, "batch_size": 16, "learning_rate": 1.5e-3, "precision": "fp32", "max_truncated": 1.0}
TUNED = {"epochs": 20, "batch_size": 8, "learning_rate": 3e-3, "precision": "fp32", "max_truncated": 1.0}
MOST = 150  # epochs over nine sentences, to learn them

Row = dict[str, str]


# --- digits


def digits(data: Path) -> list[Row]:
    """Path, label, speaker and take of each recording."""
    found = []
    for path in sorted((data / "fsdd").glob("*.wav")):
        digit, speaker, take = path.stem.split("_")
        found.append({"audio": str(path.resolve()), "label": digit, "speaker": speaker, "take": take})
    return found


def sides(folder: Path, side_of: Callable[[Row], str | None], rows: Sequence[Row]) -> Path:
    """A folder of train.csv, val.csv and test.csv."""
    folder.mkdir(parents=True)
    for side in ("train", "val", "test"):
        with (folder / f"{side}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["audio", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if side_of(row) == side)
    return folder


def small_encoder(folder: Path) -> Path:
    """A Whisper whose encoder reads one second at 8 kHz."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    config = tf.WhisperConfig(
        d_model=192, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=384, decoder_ffn_dim=96, num_mel_bins=40, max_source_positions=50, vocab_size=53, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, decoder_start_token_id=2, classifier_proj_size=96, dropout=0.1,
    )  # fmt: skip
    tf.WhisperForAudioClassification(config).save_pretrained(folder)
    tf.WhisperFeatureExtractor(
        feature_size=40, sampling_rate=8000, hop_length=80, n_fft=256, chunk_length=1
    ).save_pretrained(folder)
    return folder


def prepared(model: Path, data: Path, training: dict[str, Any], seed: int = 0) -> Any:
    """A run of LoRA that has not begun."""
    from afina.training.recipe import DataOptions, Recipe, TrainingOptions
    from afina.training.run import prepare

    recipe = Recipe(
        task={"name": "audio_classification"}, model=str(model), data=DataOptions(file=str(data)),
        method={"name": "lora", "r": 8}, training=TrainingOptions(seed=seed, **training),
    )  # fmt: skip
    return prepare(recipe, Path(tempfile.mkdtemp()) / "run")


def accuracy(run: Any, model: Any) -> tuple[int, int]:
    """Right rows of the test side, and all of them."""
    from afina.training.loop import make_engine, predict

    rows = run.rows["test"]
    answers = predict(model, run.task, rows, 32, make_engine("fp32"), exact=True)
    return round(run.task.metrics(answers, rows.examples)["accuracy"] * len(rows.examples)), len(rows.examples)


def trained(run: Any, model: Any) -> Any:
    """The model, trained on the rows of a run."""
    from afina.memory.heap import large_tensors_kept
    from afina.training.loop import fit, make_engine

    rows, engine = run.rows, make_engine(run.precision)
    with large_tensors_kept(run.recipe.memory.roomy(engine.device.type)), tempfile.TemporaryDirectory() as folder:
        fit(model, run.task, rows["train"], rows["validation"], run.recipe.training, engine, Path(folder))
    return model


def whole(run: Any) -> Any:
    """Every weight of the base of a run, trained."""
    import torch

    torch.manual_seed(run.recipe.training.seed)
    return trained(run, run.task.load_model(run.source.path).requires_grad_(True))


def regression(run: Any, more: Any = None) -> tuple[int, int]:
    """Logistic regression on mean and spread of each band of the same log-mel spectrum; `more`: a run whose training rows
    are learned from too."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def read(rows: Any) -> tuple[Any, list[str]]:
        found = []
        for feature in rows.features:
            frames = max(1, feature["length"] // 80)
            heard = run.task.ready(feature)["sound"][:, :frames]
            found.append(np.concatenate([heard.mean(1), heard.std(1)]))
        return np.stack(found), [example.label for example in rows.examples]

    learned, labels = read(run.rows["train"])
    if more is not None:
        others, also = read(more.rows["train"])
        learned, labels = np.concatenate([learned, others]), labels + also
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(learned, labels)
    asked, right = read(run.rows["test"])
    return int((model.predict(asked) == np.array(right)).sum()), len(right)


def measure_digits(data: Path, work: Path) -> dict[str, Any]:
    """Right answers and rows of each way."""
    rows, base = digits(data), small_encoder(work / "random")
    found: dict[str, list[int]] = {}

    def note(way: str, counts: tuple[int, int]) -> None:
        before = found.get(way, [0, 0])
        found[way] = [before[0] + counts[0], before[1] + counts[1]]
        print(way, *found[way], flush=True)

    with Clock() as clock:
        takes = sides(work / "takes", lambda row: {"2": "val", "3": "test"}.get(row["take"], "train"), rows)
        run = prepared(base, takes, WHOLE)
        note("take majority", (6, 60))
        note("take regression", regression(run))
        model = whole(run)
        note("take whole", accuracy(run, model))
        parameters = sum(p.numel() for p in model.parameters())
        for speaker in sorted({row["speaker"] for row in rows}):
            others = sides(
                work / f"not {speaker}",
                lambda row, own=speaker: ("test" if row["take"] == "3" else None) if row["speaker"] == own  # type: ignore[misc]
                else ("val" if row["take"] == "3" else "train"), rows,
            )  # fmt: skip
            own_rows = [row for row in rows if row["speaker"] == speaker]
            own = sides(work / speaker, lambda row: {"2": "val", "3": "test"}.get(row["take"], "train"), own_rows)
            run = prepared(base, others, WHOLE)
            note("speaker regression", regression(run))
            model = whole(run)
            note("speaker whole", accuracy(run, model))
            model.save_pretrained(work / f"base {speaker}")
            run.task.processor.save_pretrained(work / f"base {speaker}")
            tuned = prepared(work / f"base {speaker}", own, TUNED)
            note("speaker regression, his too", regression(run, tuned))
            note("speaker tuned", accuracy(tuned, trained(tuned, tuned.model)))
    adapters, _ = tuned.model.get_nb_trainable_parameters()
    times = {"cpu_s": round(clock.cpu), "wall_s": round(clock.wall)}
    return {"ways": found, "parameters": parameters, "adapters": adapters, **times}


# --- Whisper


def whisper_tokenizer(file: Path) -> Any:
    """Whisper's own, from the list of its tokens in the order in which they were merged."""
    import transformers as tf
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file.open("rb"))}
    letters = bytes_to_unicode()
    shown = {token: "".join(letters[byte] for byte in token) for token in ranks}
    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>",
               "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]  # fmt: skip
    vocab = {shown[token]: rank for token, rank in ranks.items()}
    vocab |= {token: len(ranks) + i for i, token in enumerate(special)}
    merges = [tuple("".join(letters[byte] for byte in part) for part in parts) for parts in _merged(ranks)]
    return tf.WhisperTokenizer(vocab=vocab, merges=merges, unk_token=special[0], bos_token=special[0], eos_token=special[0],
                               pad_token=special[0], extra_special_tokens=special[1:])  # fmt: skip


def _merged(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two tokens that each longer one was made of."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(one + other, rank) for one, other in itertools.pairwise(parts)]
            place = pairs.index(min(pairs))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def small_whisper(folder: Path, tokenizer: Any) -> Path:
    """Whisper made small, with its own tokens and random weights; its windows are 12 seconds and not 30."""
    import torch
    import transformers as tf

    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    config = tf.WhisperConfig(
        d_model=256, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=1024, decoder_ffn_dim=1024, vocab_size=len(tokenizer), max_source_positions=600,
        max_target_positions=448, pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=end + 1,
        init_std=0.05,
    )  # fmt: skip
    model = tf.WhisperForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.decoder.embed_tokens.weight.data[end], std=config.init_std)  # else 0: it pads, too
    model.save_pretrained(folder)
    tf.WhisperProcessor(tf.WhisperFeatureExtractor(chunk_length=12), tokenizer).save_pretrained(folder)
    return folder


def sentences(data: Path, folder: Path) -> Path:
    """The nine sentences to learn; validation and test hold three digits each: a recording is on one side."""
    with (data / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = [{"audio": str((data / row["file_name"]).resolve()), "label": row["transcription"]}
                for row in csv.DictReader(file)]  # fmt: skip
    long = [row for row in rows if "/fsdd/" not in row["audio"]]
    short = [row for row in rows if "/fsdd/" in row["audio"]][:6]
    places = {id(row): side for side, some in (("train", long), ("val", short[:3]), ("test", short[3:])) for row in some}
    return sides(folder, lambda row: places.get(id(row)), [*long, *short])


def measure_whisper(data: Path, tokens: Path, work: Path, weights: str) -> dict[str, Any]:
    """Error rates on the nine sentences, before and after."""
    from afina.memory.measure import resident
    from afina.training.recipe import DataOptions, MemoryOptions, Recipe, TrainingOptions
    from afina.training.run import prepare

    base = small_whisper(work / "whisper", whisper_tokenizer(tokens))
    rows = sentences(data, work / "sentences")

    recipe = Recipe(
        task={"name": "speech_recognition", "language": "english", "max_new_tokens": 60, "max_seconds": 12},
        model=str(base),
        data=DataOptions(file=str(rows)),
        memory=MemoryOptions(weights=weights),
        method={"name": "lora", "r": 16, "modules_to_save": ["model.decoder.layer_norm"]},
        training=TrainingOptions(epochs=MOST, batch_size=9, learning_rate=4e-3, evaluate_every=MOST, warmup=0.05),
    )
    looks: list[dict[str, Any]] = []
    with Clock() as clock:
        run = prepare(recipe, work / "run")
        stored = sum(p.numel() * p.element_size() for p in run.model.parameters() if not p.requires_grad)
        looks.append({"epochs": 0, **written(run)})
        print(looks[-1], flush=True)
        trained(run, run.model)
        looks.append({"epochs": MOST, **written(run)})
        print(looks[-1], flush=True)
    adapters, _ = run.model.get_nb_trainable_parameters()
    return {
        "weights": weights, "looks": looks, "stored_mib": round(stored / 2**20, 1), "adapters": adapters,
        "parameters": sum(p.numel() for p in run.model.parameters()), "rows": len(run.rows["train"].examples),
        "cpu_s": round(clock.cpu), "wall_s": round(clock.wall), "resident_mib": round(resident() / 2**20),
    }  # fmt: skip


def written(run: Any) -> dict[str, Any]:
    """Error rates of what is written of the training rows, and the sentence of jfk.flac."""
    from afina.training.loop import make_engine, predict

    rows = run.rows["train"]
    answers = predict(run.model, run.task, rows, 9, make_engine("fp32"), exact=True, final=True)
    metrics = run.task.metrics(answers, rows.examples)
    jfk = next(a.text for a, e in zip(answers, rows.examples, strict=True) if "jfk" in e.value)
    return {"wer": metrics["wer"], "cer": metrics["cer"], "loss": metrics["loss"], "jfk": jfk}


# --- the document


def render(results: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    where = results["about"]
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    there = f"{where['cpu']}, {where['threads']} thread(s), Python {where['python']}"
    parts = [f"Measured on {where['date']}: {there}; {versions}."]
    if "digits" in results:
        one = results["digits"]
        share = lambda way: f"{one['ways'][way][0] / one['ways'][way][1]:.3f}" if way in one["ways"] else ""
        lines = [
            ["always the same digit", share("take majority"), share("take majority")],
            ["logistic regression on mean and spread of each band", share("take regression"), share("speaker regression")],
            [f"small encoder, {one['parameters']:,} weights, trained whole", share("take whole"), share("speaker whole")],
            ["logistic regression, with 20 recordings of that speaker", "", share("speaker regression, his too")],
            [f"the same encoder, and LoRA ({one['adapters']:,} weights) on 20 recordings of that speaker", "",
             share("speaker tuned")],
        ]  # fmt: skip
        parts += [
            "### Spoken digits",
            "Accuracy on 60 recordings: the last take of every digit by each of six speakers. In the first column the other "
            "takes of all speakers were heard, in the second those of the five others alone. "
            f"All of it took {one['cpu_s']} seconds of one core.",
            table(["", "a take not heard", "a speaker not heard"], lines),
        ]
    if "whisper" in results:
        one = results["whisper"]
        first, last = one["looks"][0], one["looks"][-1]
        lines = [[f"after {look['epochs']} epochs", f"{look['wer']:.1%}", f"{look['cer']:.1%}", f"{look['loss']:.3f}"]
                 for look in one["looks"]]  # fmt: skip
        parts += [
            "### Nine sentences through Whisper in int8",
            f"Whisper's architecture, two layers on each side, random weights in {one['weights']} ({one['parameters']:,} "
            f"parameters, {one['stored_mib']:.0f} MiB frozen), LoRA r=16 and the decoder's last norm ({one['adapters']:,} "
            f"weights), on jfk.flac and eight others. {one['cpu_s']} seconds of one core, loading and writing included.",
            table(["", "word error rate", "character error rate", "loss per token"], lines),
            f"Target: word error rate 0; {last['wer']:.1%}, {'met' if last['wer'] == 0 else 'not met'}. "
            f"Of jfk.flac it wrote before: {first['jfk'][:60]!r}; after: {last['jfk']!r}.",
        ]
    return "\n\n".join(parts)


def main() -> None:
    """Measure, or render what was measured."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--data", type=Path, help="folder audio_speech: fsdd/, metadata.csv and nine sentences")
    parser.add_argument("--tokenizer", type=Path, help="folder with Whisper's multilingual.tiktoken")
    parser.add_argument("--only", choices=["digits", "whisper"])
    parser.add_argument("--weights", default="int8", help="storage of Whisper's frozen weights")
    options = parser.parse_args()
    if options.markdown:
        put_into(options.markdown, "speech", render(read_json(options.output)))
        return
    if options.data is None or not (options.data / "fsdd").is_dir():
        parser.error("--data: the folder audio_speech")
    tokens = (options.tokenizer or Path()) / "multilingual.tiktoken"
    if options.only != "digits" and not tokens.is_file():
        parser.error("--tokenizer: the folder with multilingual.tiktoken")
    results = read_json(options.output) if options.output.is_file() else {}
    quiet()
    results["about"] = about(PACKAGES, 1)
    with tempfile.TemporaryDirectory() as work:
        if options.only != "whisper":
            results["digits"] = measure_digits(options.data, Path(work))
        if options.only != "digits":
            results["whisper"] = measure_whisper(options.data, tokens, Path(work), options.weights)
    write_json(options.output, results)


if __name__ == "__main__":
    main()
