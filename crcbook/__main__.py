"""``python -m crcbook``: the command line of :mod:`crcbook.commands`."""

import sys

if __name__ == "__main__":
    try:
        from crcbook.commands import main

        status = main()
    except KeyboardInterrupt:  # before any work, which explains its own
        print("crcbook: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
