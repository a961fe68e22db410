"""`python -m afina`, and `torchrun --nproc-per-node 2 -m afina train ...` for several processes."""

from afina.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
