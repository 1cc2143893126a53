"""`python -m jaxdp`."""

import sys


def run() -> int:
    """The command line, whose own imports may be interrupted as well."""
    try:
        from jaxdp.cli import main

        return main()
    except KeyboardInterrupt:
        print("jaxdp: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
