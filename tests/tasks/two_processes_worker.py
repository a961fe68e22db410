"""One of two processes that run every recipe below a folder, one after the other."""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import PartialState

from afina.training.recipe import read_recipe
from afina.training.run import prepare

if __name__ == "__main__":
    for recipe in sorted(Path(sys.argv[1]).glob("*/recipe.yaml")):
        prepare(read_recipe(recipe), recipe.parent / "two").execute()
    assert PartialState().num_processes == 2, PartialState()
