"""Signal to noise, against one gradient at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import lipschitz
from tests import helpers
from tests.lipschitz.test_bounded_grads import BATCH, PARAMS, ROWS, loss_fn

MASK = jnp.arange(ROWS) < 4


def norms_by_hand() -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Of each sample, and of the mean of those that count."""
    grads = jax.vmap(jax.grad(loss_fn), (None, 0))(PARAMS, BATCH)
    each, mean = {}, {}
    for name, leaf in zip(["body/b", "body/w", "head"], jax.tree.leaves(grads), strict=True):
        rows = np.asarray(leaf, np.float64).reshape(ROWS, -1)[:4]
        each[name] = np.append(np.linalg.norm(rows, axis=1), [0, 0])
        mean[name] = float(np.linalg.norm(rows.mean(0)))
    return each, mean


def test_of_each_sample() -> None:
    found = lipschitz.signal_to_noise_elementwise(loss_fn, PARAMS, BATCH, 1.0, mask=MASK)
    each, _ = norms_by_hand()
    helpers.assert_trees_close(dict(found.norms), each, rtol=1e-4, atol=1e-5)
    for name, ratio in found.ratios.items():
        np.testing.assert_allclose(ratio, found.norms[name] / found.bounds[name], rtol=1e-6)
        assert np.all(ratio <= 1)


def test_of_the_mean() -> None:
    found = lipschitz.signal_to_noise_average(loss_fn, PARAMS, BATCH, 1.0, mask=MASK)
    _, mean = norms_by_hand()
    assert {name: round(float(norm), 4) for name, norm in found.norms.items()} == {
        name: round(norm, 4) for name, norm in mean.items()
    }
    bounds = lipschitz.bounds(loss_fn, PARAMS, (BATCH[0][0], BATCH[1][0]), 1.0).by_name
    helpers.assert_trees_close(found.bounds, bounds)
    for name, ratio in found.ratios.items():
        np.testing.assert_allclose(ratio, found.norms[name] / bounds[name], rtol=1e-6)


def test_of_no_sample_at_all() -> None:
    nobody = jnp.zeros(ROWS, bool)
    found = lipschitz.signal_to_noise_average(loss_fn, PARAMS, BATCH, 1.0, mask=nobody)
    assert all(float(norm) == 0 for norm in found.norms.values())
