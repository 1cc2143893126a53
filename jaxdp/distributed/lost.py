"""The error of a job that has lost a process."""

import contextlib
from collections.abc import Iterator

import jax

# Messages of the transports and of JAX's coordination service in this case.
_SIGNS = ("Gloo", "UNAVAILABLE", "heartbeat", "Connection closed", "Connection reset")


class ProcessLost(RuntimeError):
    """Another process of the job has ended, and this one cannot go on without it."""


@contextlib.contextmanager
def every_process_needed(what_next: str) -> Iterator[None]:
    """Turns the error of JAX after the death of another process into a `ProcessLost`.

    Args:
      what_next: what the user should do, a sentence.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        count = jax.process_count()
        if count == 1 or not any(sign in str(error) for sign in _SIGNS):
            raise
        raise ProcessLost(
            f"another of the {count} processes of this job has ended, see its own output for why: "
            f"{what_next}"
        ) from error
