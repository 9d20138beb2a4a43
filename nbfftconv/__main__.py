"""`python -m nbfftconv` is the command `nbfftconv`."""

import sys

from nbfftconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
