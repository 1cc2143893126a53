"""The bound rules of the primitives of JAX, one file per family."""

# Imported for their rules, which they register.
from jaxdp.lipschitz.rules import elementwise as elementwise
from jaxdp.lipschitz.rules import indexing as indexing
from jaxdp.lipschitz.rules import products as products
from jaxdp.lipschitz.rules import reductions as reductions
from jaxdp.lipschitz.rules import structure as structure
