"""`python -m loka`."""

from loka.cli import main

if __name__ == "__main__":
    main()
