"""The kinds of site whose gradients are factored: one file each, and none knows another."""

from jaxdp.engine.kinds.base import Kind as Kind
from jaxdp.engine.kinds.conv import Convolution
from jaxdp.engine.kinds.dot import DotGeneral
from jaxdp.engine.kinds.gather import DynamicSlice, Gather

# By the name of the primitive. What is not here is promoted (`engine.uses`).
KINDS: dict[str, Kind] = {
    "dot_general": DotGeneral(),
    "conv_general_dilated": Convolution(),
    "gather": Gather(),
    "dynamic_slice": DynamicSlice(),
}
