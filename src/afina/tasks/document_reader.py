"""What makes the input of a model of documents: its tokenizer and, where it looks at pages, its image processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DocumentReader"]


@dataclass
class DocumentReader:
    """Both parts; `pages` is None for a model that reads words and boxes alone."""

    tokenizer: Any
    pages: Any = None

    def save_pretrained(self, folder: str | Path) -> None:
        """Into one folder, where they are found again."""
        self.tokenizer.save_pretrained(folder)
        if self.pages is not None:
            self.pages.save_pretrained(folder)
