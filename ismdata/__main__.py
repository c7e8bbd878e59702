"""`python -m ismdata` is `ismdata`, so that torchrun can start it."""

from ismdata.cli import main

if __name__ == "__main__":
    main()
