"""`python -m stockade` is the command `stockade`."""

from .cli import main

if __name__ == "__main__":
    main()
