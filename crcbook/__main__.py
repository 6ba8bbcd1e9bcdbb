"""``python -m crcbook``: the command line of :mod:`crcbook.commands`."""

import sys

from crcbook.commands import main

if __name__ == "__main__":
    sys.exit(main())
