"""``python -m oodcli``."""

from oodcli.cli import main

if __name__ == "__main__":
    main()
