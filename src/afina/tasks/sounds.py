"""What tasks on recordings have in common: a recording becomes what the model's feature extractor makes of it, when needed.

Features hold a path, a digest and a length; sound is read, brought to the model's rate and made features by threads, a step
ahead. A row must mean the same whatever stands beside it (T25), so padding is never seen: extractors that make pictures of
sound (Whisper, AST) give every row one size; models that read samples get a mask; and those among them that cannot (wav2vec2
with GroupNorm, whose statistics run over the whole length) read rows of one length together and others apart.

What a checkpoint says of masking stretches (SpecAugment) and of leaving out whole layers is put off: both draw from
generators of their own, which no checkpoint of a run holds (T3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from afina.core.config import option
from afina.data.example import Example
from afina.data.sounds import Size, check_soundfile, read_sound, size_of
from afina.errors import ConfigError, DataError
from afina.tasks.files import FileTask
from afina.tasks.task import NO_LIMIT, Batch, Encoded, Feature

__all__ = ["SHORTEST", "SoundOptions", "SoundTask", "steady", "still"]

SHORTEST = 0.05  # seconds; a shorter recording is followed by silence, up to this
_THREADS = 4
_OFF = {"apply_spec_augment": False, "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}


@dataclasses.dataclass
class SoundOptions:
    """How much of a recording is read."""

    max_seconds: float = option(30.0, "seconds of a recording that are read at most, the first of them", low=0.1)


def steady(path: str) -> dict[str, Any]:
    """Settings that put off what a checkpoint would draw by chance behind the run's back."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    return {name: value for name, value in _OFF.items() if hasattr(config, name)}


def still(config: Any) -> None:
    """Put off the same in the configuration of a part that is there."""
    for name, value in _OFF.items():
        if hasattr(config, name):
            setattr(config, name, value)


class SoundTask(FileTask):
    """A task whose input is a recording. `Options` has the fields of `SoundOptions`."""

    processor_kind: ClassVar[str] = "feature_extractor"
    unit: ClassVar[str] = "samples"
    options: Any

    def __init__(self, processor: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        check_soundfile()
        super().__init__(processor, options, learned)
        self.extractor = getattr(processor, "feature_extractor", processor)
        if not getattr(self.extractor, "sampling_rate", None):
            made = type(self.extractor).__name__
            raise ConfigError(f"{self.name} needs a model with a feature extractor for sound; this one has a {made}")

    @property
    def rate(self) -> int:
        """Samples a second that the model reads."""
        return int(self.extractor.sampling_rate)

    @property
    def most(self) -> int:
        """Samples that are read of a recording at most: what the options allow and the extractor takes."""
        own = getattr(self.extractor, "n_samples", None)  # Whisper's
        frames = getattr(self.extractor, "max_length", None)  # AST's, one each 10 ms, over 25
        if own is None and isinstance(frames, int):
            own = int((frames - 1) * 0.010 * self.rate + 0.025 * self.rate)
        return min(int(self.options.max_seconds * self.rate), own or NO_LIMIT * self.rate)

    def settle_padding(self, model: Any) -> None:
        """Learn whether rows of different lengths may be read together."""
        self.learned["apart"] = getattr(model.config, "feat_extract_norm", "layer") == "group"

    def paths(self, model: Any) -> list[str]:
        """Whether recordings are read one by one."""
        if not self.learned.get("apart"):
            return []
        return ["recordings of different lengths are read one by one: this model's GroupNorm would see their padding"]

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """The path of every recording, a digest of what it holds and its length; its targets are for the task to add."""
        with ThreadPoolExecutor(_THREADS) as pool:
            sizes = list(pool.map(self._size, examples))
        features, cut = list[Feature](), 0
        for row, (example, size) in enumerate(zip(examples, sizes, strict=True)):
            length = size.at(self.rate)
            cut += length > self.most
            features.append({"file": example.value, "holds": example.text, "length": min(length, self.most), "row": row})
        notes = []
        for rate in sorted({size.rate for size in sizes} - {self.rate}):
            many = sum(size.rate == rate for size in sizes)
            lacking = f", and hold nothing above {rate // 2:,} Hz" if rate < self.rate else ""
            notes.append(f"{many} recordings are brought from {rate:,} to {self.rate:,} Hz{lacking}")
        if cut:
            notes.append(f"{cut} recordings are cut at their end to {self.most / self.rate:g} seconds")
        return Encoded(features, cut, None, notes)

    def _size(self, example: Example) -> Size:
        if not example.value:
            return Size(self.most, self.rate)
        try:
            return size_of(example.value)
        except (ValueError, OSError) as error:
            raise DataError(f"{example.value}: {error}; it could be read when the run began") from None

    def sound(self, feature: Feature) -> np.ndarray:
        """The samples of a feature, `[samples]`. Raises DataError where the file can no longer be read."""
        if not feature["file"]:
            return np.random.default_rng(0).standard_normal(feature["length"]).astype(np.float32) / 10
        try:
            made = read_sound(feature["file"], self.rate, self.most)
        except (ValueError, OSError) as error:
            raise DataError(f"{feature['file']}: {error}; it could be read when the run began") from None
        return np.pad(made, (0, max(0, int(SHORTEST * self.rate) - len(made))))

    def ready(self, feature: Feature, chance: str | None = None) -> Feature:
        """With "sound", as the extractor makes it: samples `[samples]` or frames of two dimensions, float32."""
        made = self.extractor(self.sound(feature), sampling_rate=self.rate, return_tensors="np")
        return {**feature, "sound": np.asarray(made[self.extractor.model_input_names[0]][0], dtype=np.float32)}

    def collate(self, features: Sequence[Feature]) -> Batch:
        """What the model reads, by its name; of samples "attention_mask" `[rows, samples]`; "samples" `[rows]`."""
        made = [f if "sound" in f else self.ready(f) for f in features]
        sounds = [torch.from_numpy(f["sound"]) for f in made]
        name = self.extractor.model_input_names[0]
        longest = max(len(sound) for sound in sounds)
        batch = {"samples": torch.tensor([f["length"] for f in made])}
        if sounds[0].ndim == 1:
            batch[name] = torch.stack([F.pad(sound, (0, longest - len(sound))) for sound in sounds])
            batch["attention_mask"] = (torch.arange(longest) < torch.tensor([[len(s)] for s in sounds])).long()
            return batch
        if len({sound.shape for sound in sounds}) > 1:
            said = ", ".join(f"{list(f['sound'].shape)} ({f['file']})" for f in made[:3])
            raise DataError(f"this model's feature extractor makes rows of different sizes: {said}; a batch needs one")
        batch[name] = torch.stack(sounds)
        return batch

    def noises(self, seconds: Sequence[float]) -> list[Feature]:
        """Features of noise of so many seconds, for which no file is read."""
        lengths = (min(int(length * self.rate), self.most) for length in seconds)
        return [{"file": "", "holds": "", "length": length, "row": row} for row, length in enumerate(lengths)]

    def heard(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        """What of a batch the model is called with."""
        return {key: batch[key] for key in (self.extractor.model_input_names[0], "attention_mask") if key in batch}

    def logits(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores of the model in float32; of models that would see padding, row by row where lengths differ."""
        heard = self.heard(batch)
        if not self.learned.get("apart") or "attention_mask" not in heard:
            return model(**heard).logits.float()  # type: ignore[no-any-return]
        lengths = heard.pop("attention_mask").sum(1).tolist()
        ((name, sounds),) = heard.items()
        if len(set(lengths)) == 1:
            return model(**{name: sounds}).logits.float()  # type: ignore[no-any-return]
        scores = [model(**{name: one[None, :length]}).logits[0] for one, length in zip(sounds, lengths, strict=True)]
        return pad_sequence(scores, batch_first=True).float()

    def amount(self, batch: Batch) -> int:
        """Samples, without padding."""
        return int(batch["samples"].sum())

    def rendered(self, feature: Feature) -> tuple[list[str], list[bool]]:
        """Its length and its size as the model gets it."""
        shape = " x ".join(map(str, self.ready(feature)["sound"].shape))
        return [f"{feature['length'] / self.rate:.2f} seconds, {shape} numbers"], [False]
