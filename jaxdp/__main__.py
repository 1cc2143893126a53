"""`python -m jaxdp`."""

import sys

from jaxdp import interrupts
from jaxdp.cli import main


def run() -> int:
    """The command line, which Ctrl-C ends with one line at any moment."""
    try:
        interrupts.become_exceptions()
        return main()
    except KeyboardInterrupt:
        print("jaxdp: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
