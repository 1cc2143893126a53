"""Losses of one example with a gradient that is bounded, whatever the prediction.

The bound on the gradient with respect to the prediction z, with Z the bound on its norm, K the
number of classes, and n the number of outputs:

| loss                           | bound                                     |
|--------------------------------|-------------------------------------------|
| softmax_cross_entropy          | √2, less where τZ is small: see there     |
| binary_cross_entropy           | min(1/√n, (√n/2 + τZ/4)/n)                |
| multiclass_hinge               | √((K − 1)/K)                              |
| cosine_similarity              | 1/ρ                                       |
| mean_absolute_error            | 1/√n                                      |
| kantorovich_rubinstein         | of p: see there                           |
| hinge_kantorovich_rubinstein   | α times the hinge's, plus the one above   |

Taken apart into primitives, these losses have bounds that are too large to be useful. A known label
outside of 0..K-1 is refused. A traced one makes the loss NaN, while its gradient stays within the
bound: without a clip no example is dropped, so none may spoil the sum.
"""

from jaxdp.lipschitz.losses.cross_entropy import binary_cross_entropy as binary_cross_entropy
from jaxdp.lipschitz.losses.cross_entropy import softmax_cross_entropy as softmax_cross_entropy
from jaxdp.lipschitz.losses.distance import cosine_similarity as cosine_similarity
from jaxdp.lipschitz.losses.distance import mean_absolute_error as mean_absolute_error
from jaxdp.lipschitz.losses.margin import (
    hinge_kantorovich_rubinstein as hinge_kantorovich_rubinstein,
)
from jaxdp.lipschitz.losses.margin import kantorovich_rubinstein as kantorovich_rubinstein
from jaxdp.lipschitz.losses.margin import multiclass_hinge as multiclass_hinge
