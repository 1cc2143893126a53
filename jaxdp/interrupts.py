"""Ctrl-C during the imports of `python -m jaxdp` ends it at once and without a traceback.

JAX takes seconds to import, and Python would show a traceback of the import that it interrupted.
This module is imported first, and has no effect on programs that import jaxdp.
"""

import signal
import sys

# By Python's documentation, sys.argv[0] is "-m" until the module to be run has been found.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def become_exceptions() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
