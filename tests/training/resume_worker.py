"""A run that may be stopped: prints each step, so that the one who watches knows when to."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_loop import fitted, prepared
from test_resume import OPTIONS

if __name__ == "__main__":
    folder, output, resume = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "resume"
    run = prepared((str(folder / "base"), str(folder / "rows.csv")), folder / "none", **OPTIONS)
    run.output = output

    def tell(line):
        print(line["step"], flush=True)
        time.sleep(0.02)  # so that a signal can meet every part of a step

    fitted(run, tell, resume=resume)
