"""What tasks have in common whose model reads with an encoder and writes with a decoder: targets of the decoder, which
foretells at each place the label of that place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from afina.tasks.batches import padded
from afina.tasks.head_loss import Aim, supervised
from afina.tasks.task import IGNORED, Batch, Feature
from afina.tasks.writing import WritingTask

__all__ = ["DecoderTask"]


class DecoderTask(WritingTask):
    """A task that writes with a decoder; features hold "decoder_ids" and "labels" where the text is known."""

    def decoded(self, features: Sequence[Feature]) -> Batch:
        """What the decoder reads and labels `[rows, tokens]`, padded on the right; "asked" `[rows]`: 1 where a text is to
        be written."""
        batch = {"asked": torch.tensor([int(self._asked(f)) for f in features])}
        if all("labels" in f for f in features):
            batch["labels"] = padded([f["labels"] for f in features], IGNORED)
            batch["decoder_input_ids"] = padded([f["decoder_ids"] for f in features], self.tokenizer.pad_token_id)
        return batch

    def _asked(self, feature: Feature) -> bool:
        return "labels" not in feature or (self.options.generate and feature["row"] < self.options.generate_rows)

    def aim(self, batch: Mapping[str, torch.Tensor]) -> Aim:
        """The decoder at each place foretells the label of that place."""
        labels = batch["labels"]
        rows, places = supervised(labels)
        return Aim(rows, places, labels[rows, places], labels.shape[1])
