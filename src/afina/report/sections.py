"""The parts of the page, in the order in which a reader asks. A part that a task does not have is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from afina.report.answer import figures
from afina.report.beside import furthest, written
from afina.report.drawn import drawn
from afina.report.findings import findings
from afina.report.folder import RunFolder
from afina.report.history import cost, curves, trained
from afina.report.lengths import lengths
from afina.report.marked import mistaken_answers, mistaken_tags
from afina.report.marked_pages import mistaken_pages
from afina.report.markup import Markup
from afina.report.misheard import misheard
from afina.report.misses import misses
from afina.report.mistakes import mistaken_classes, mistaken_labels
from afina.report.pictures import worst_masks
from afina.report.preferred import before_and_after, misjudged, misranked
from afina.report.results import calibrated, classes, confusions, numbers
from afina.report.usage import usage

__all__ = ["Section", "sections"]

Made = Callable[[RunFolder], Markup | None]


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its title, and what it shows."""

    key: str
    title: str
    body: Markup


def examples(run: RunFolder) -> Markup | None:
    """Answers with their texts, in the way of the task."""
    if run.task == "dreambooth":
        return None
    made: dict[str, Made] = {
        "audio_classification": mistaken_classes,
        "image_classification": mistaken_classes,
        "semantic_segmentation": worst_masks,
        "sequence_classification": mistaken_classes,
        "speech_recognition": misheard,
        "multi_label_classification": mistaken_labels,
        "token_classification": mistaken_tags,
        "document_token_classification": mistaken_pages,
        "question_answering": mistaken_answers,
        "regression": furthest,
        "reward": misranked,
        "dpo": misranked,
        "orpo": misranked,
        "kto": misjudged,
        "grpo": before_and_after,
        "reranking": misses,
        "sentence_similarity": furthest if "spearman" in run.figures else misses,
    }
    return made.get(run.task, written)(run)


def also_written(run: RunFolder) -> Markup | None:
    """Texts before and after, of a task whose mistakes are others."""
    return before_and_after(run) if run.task != "grpo" else None


_PARTS: tuple[tuple[str, str, Made], ...] = (
    ("pictures", "Before and after", drawn),
    ("figures", "Every figure", figures),
    ("model", "What was trained on what", trained),
    ("training", "How training went", curves),
    ("confusions", "What is taken for what", confusions),
    ("classes", "Each class", classes),
    ("numbers", "Answers beside the right numbers", numbers),
    ("calibration", "Are the probabilities right?", calibrated),
    ("mistakes", "The worst mistakes", examples),
    ("written", "What it writes, before and after", also_written),
    ("data", "The data", findings),
    ("lengths", "How long the rows are", lengths),
    ("cost", "What it cost", cost),
    ("use", "How to use it", usage),
)
_TITLES = {
    ("classes", "token_classification"): "Each type",
    ("classes", "document_token_classification"): "Each type",
    ("classes", "multi_label_classification"): "Each label",
    ("mistakes", "causal_lm"): "What it writes",
    ("mistakes", "semantic_segmentation"): "How well pixels are met",
    ("mistakes", "seq2seq"): "What it writes",
    ("mistakes", "grpo"): "What it writes, before and after",
}


def sections(run: RunFolder) -> list[Section]:
    """The parts that this run has."""
    made = ((key, _TITLES.get((key, run.task), title), make(run)) for key, title, make in _PARTS)
    return [Section(key, title, body) for key, title, body in made if body is not None]
