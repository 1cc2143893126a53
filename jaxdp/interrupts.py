"""Ctrl-C while `python -m jaxdp` is being imported ends it at once and without a word.

JAX takes seconds to import, and Python would show a traceback of wherever it was. Imported first of
all, and without effect on programs that import jaxdp.
"""

import signal
import sys

# Python's documentation has it that "-m" stands there until the module to be run has been found.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def become_exceptions() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
