"""`python -m pyvolconv`: the same as the command `pyvolconv`."""

from .cli import main

if __name__ == "__main__":
    main()
