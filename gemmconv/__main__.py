"""`python -m gemmconv`: see cli.py."""

import sys

from gemmconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
