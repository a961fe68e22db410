"""What is taught to a diffusion model: the options of the task, and the rows that folders of pictures become."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from afina.core.config import option
from afina.data.example import Example
from afina.data.rows import Rows as Cells
from afina.data.table import Table
from afina.diffusion.pictures import find_pictures
from afina.errors import DataError

__all__ = ["DreamBoothOptions", "picture_with_prompt", "table_of_pictures"]


@dataclasses.dataclass
class DreamBoothOptions:
    """What is taught, and how."""

    instance_prompt: str = option("", "prompt of the pictures, with a rare word for the subject: a photo of sks dog")
    class_prompt: str = option("", "prompt of the subject's class, whose pictures are learned too: a photo of a dog")
    class_folder: str = option("", "folder of the pictures of the class; `afina dreambooth` makes those that are missing")
    class_pictures: int = option(100, "pictures of the class", low=1)
    prior_weight: float = option(1.0, "weight of the class pictures in the loss", low=0.0)
    resolution: int | None = option(None, "pixels of a side; None: what the pipeline was made for", low=16)
    crop: str = option("center", "where the square is cut out of a picture", choices=("center", "random"))
    flip: bool = option(False, "mirror half of the pictures, anew in every step")
    text_tokens: int | None = option(None, "tokens of a prompt for T5; None: 256 for SD3, 512 for Flux", low=2, high=512)
    text_encoders: bool = option(False, "train the text encoders too (those of CLIP)")
    cache: str = option(
        "auto", "encode pictures and prompts once: wherever they do not change, or on or off", choices=("auto", "on", "off")
    )
    show: list[str] = option(None, "prompts of the pictures in the report; none: the instance prompt", factory=list)
    show_steps: int = option(30, "steps in which they are made", low=1)
    show_seed: int = option(0, "of the first of them", low=0)
    show_pictures: int = option(2, "pictures of each prompt; 0: none are made", low=0)

    @property
    def varies(self) -> str:
        """What makes a picture another in every step, as it is typed."""
        return "task.crop=random" if self.crop == "random" else "task.flip=true" if self.flip else ""


def picture_with_prompt(row: Mapping[str, str], line: int | str) -> Example:
    """A picture, its prompt, and a picture of its class where there is one."""
    parts = [row["image"], row.get("text_pair", ""), row.get("text", "")]
    return Example(" ".join(filter(None, parts)), "", line, value=row.get("text", ""), group=row["image"])


def table_of_pictures(options: DreamBoothOptions, folder: Path) -> Table:
    """A row for each picture of the subject, and as many more as there are pictures of the class."""
    subject = find_pictures(folder, "the folder of the pictures,")
    others: list[Path] = []
    if options.class_prompt:
        if not Path(options.class_folder).expanduser().is_dir():
            raise DataError(
                f"task.class_folder: there is no folder {options.class_folder}; `afina dreambooth` makes the pictures that "
                "are missing in it"
            )
        others = find_pictures(Path(options.class_folder).expanduser(), "task.class_folder:")[: options.class_pictures]
    columns = ["image", "class_image", "prompt"]
    table = Table(folder, columns, Cells(columns), [], "", "", text="prompt")
    table.image, table.text_pair = "image", "class_image"
    for i in range(max(len(subject), len(others))):
        picture = subject[i % len(subject)]
        said = picture.with_suffix(".txt")
        prompt = said.read_text(encoding="utf-8").strip() if said.is_file() else options.instance_prompt
        other = str(others[i % len(others)].absolute()) if others else ""
        table.rows.append((str(picture.absolute()), other, prompt))
        table.lines.append(f"{picture.name}, {Path(other).name}" if other else picture.name)
    table.notes.append(f"{len(subject)} pictures of the subject" + (f", {len(others)} of its class" if others else ""))
    return table
