"""`python -m vla_pruner`: the command line, where the installed command is not on the path."""

import sys

from vla_pruner.cli import main

if __name__ == "__main__":
    sys.exit(main())
