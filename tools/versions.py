"""Prints the Python and the JAX of the environment it runs in."""

import platform
from importlib.metadata import version

print(f"Python {platform.python_version()} with JAX {version('jax')}")
