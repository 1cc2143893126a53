"""Batch statistics in the loss of one example are refused."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxdp
from tests.helpers import KEY

X = jax.random.normal(KEY, (4, 3))


class Normalised(nn.Module):
    """A layer of batch normalisation; `early` says so in the constructor."""

    early: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.early:
            return nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(2)(x))
        return nn.BatchNorm(name="norm")(nn.Dense(2)(x), use_running_average=not train)


def loss_of(model: Normalised, train: bool) -> Any:
    def loss(variables: Any, x: jax.Array) -> jax.Array:
        if not train:
            return jnp.sum(jnp.square(jnp.asarray(model.apply(variables, x[None], train))))
        out, _ = model.apply(variables, x[None], train, mutable=["batch_stats"])
        return jnp.sum(out**2)

    return loss


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("method", ["auto", "dense"])
def test_batch_statistics_raise_and_running_averages_train(early: bool, method: str) -> None:
    model = Normalised(early)
    variables = model.init(KEY, X, train=False)
    grads_fn = jaxdp.per_sample_grads(loss_of(model, train=False), method=method)
    assert float(jnp.min(grads_fn(variables, X).norms())) > 0
    refused = jaxdp.per_sample_grads(loss_of(model, train=True), method=method)
    with pytest.raises(ValueError, match="BatchNorm 'norm' must not compute batch statistics"):
        refused(variables, X).norms()
