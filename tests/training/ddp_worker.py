"""One of two processes that train together; the first says whether they got what one process gets."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from test_loop import fitted, prepared


def main(folder: Path) -> None:
    expected = torch.load(folder / "expected.pt", weights_only=True)
    places = (str(folder / "base"), str(folder / "rows.csv"))
    losses: list[float] = []
    options = {"epochs": 1, "batch_size": 5, "gradient_accumulation": 2}
    run = prepared(places, folder / "two", **options)
    _, weights = fitted(run, lambda line: losses.append(line["loss"]) if "loss" in line else None)
    state = PartialState()
    assert state.num_processes == 2, state
    for name, value in expected["weights"].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=2e-4)
    if state.is_main_process:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected["losses"]), rtol=1e-4, atol=1e-6)
        print("EQUAL")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
