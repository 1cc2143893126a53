"""The ways to compute per-sample gradients: one file each.

| method  | passes                          | keeps until the norms are known    |
|---------|---------------------------------|------------------------------------|
| `dense` | `vmap(grad)`                    | every per-sample gradient          |
| `slots` | one forward, one backward       | operands and cotangents of a batch |
| `taps`  | one forward, two backward       | next to nothing                    |
| `fused` | as slots, clips layer by layer  | operands and cotangents of a layer |

`base` says what a method must provide, `choice` takes the one that suits a loss, `settle` keeps
samples that are not finite out of a pass that mixes samples.
"""

from jaxdp.engine.methods.base import Method as Method
from jaxdp.engine.methods.dense import Dense
from jaxdp.engine.methods.fused import Fused
from jaxdp.engine.methods.slots import Slots
from jaxdp.engine.methods.taps import Taps

# By the name that `jaxdp.per_sample_grads(..., method=)` knows it under.
METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "slots": Slots,
    "taps": Taps,
    "fused": Fused,
}
