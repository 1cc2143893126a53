"""The worked examples of CONTRIBUTING.md do what their text says."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from jaxdp.accounting import epsilon
from jaxdp.engine.kinds import KINDS
from jaxdp.engine.methods import METHODS
from jaxdp.sampling import sampler_from_dict
from jaxdp.sampling.registry import SAMPLERS
from tests.helpers import KEY
from tests.oracle import check_against_oracle
from tests.training import small

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def example(section: str) -> dict[str, Any]:
    """What the program of a section defines."""
    _, text = TEXT.split(f"## {section}\n")
    (code,) = re.findall(r"```python\n(.*?)```", text.partition("\n## ")[0], re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def loss(params: Any, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, scale: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(h * scale[None]), None

    h, _ = jax.lax.scan(layer, x * params["first"][None], params["scales"])
    return jnp.sum(h**2)


def arguments() -> tuple[Any, jax.Array]:
    keys = jax.random.split(KEY, 3)
    params = {
        "first": jax.random.normal(keys[0], (4,)),
        "scales": jax.random.normal(keys[1], (3, 4)),
    }
    return params, jax.random.normal(keys[2], (5, 2, 4))


def test_the_example_of_a_new_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its registration is all that it needs: it is checked, explained, put into microbatches."""
    monkeypatch.setitem(METHODS, "one_by_one", example("Adding a method")["OneByOne"])
    params, batch = arguments()
    mask = [True, True, False, True, True]
    for size in (None, 2):
        check_against_oracle(
            loss, params, batch, method="one_by_one", mask=mask, microbatch_size=size
        )
    explanation = jaxdp.explain(loss, params, batch, method="one_by_one", memory_budget=100)
    assert [leaf.form for leaf in explanation.leaves] == ["one by one"] * 2
    # 16 numbers, whatever the size of the batch.
    assert (explanation.microbatch_size, explanation.reason) == (None, "keeps 64 B")
    with pytest.raises(ValueError, match="one_by_two"):
        jaxdp.per_sample_grads(loss, method="one_by_two")


def test_the_example_of_a_new_kind_of_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "mul", example("Adding a kind of site")["Scale"]())
    params, batch = arguments()
    explanation = jaxdp.explain(loss, params, batch)
    assert [leaf.form for leaf in explanation.leaves] == ["summed products"] * 2
    assert explanation.leaves[1].sites == "mul in scan of 3"
    for method in ("slots", "taps", "fused"):
        check_against_oracle(loss, params, batch, method=method)


def test_the_example_of_a_new_sampler() -> None:
    try:
        sampler = example("Adding a sampler")["WholeSampler"](24, physical_batch_size=10, seed=1)
        assert SAMPLERS["whole"] is type(sampler)
        batches = sampler.draw(5)
        assert [batch.is_last for batch in batches] == [False, False, True]
        taken = np.concatenate([batch.indices[batch.mask] for batch in batches])
        assert taken.tolist() == list(range(24))
        assert sampler_from_dict(sampler.to_dict()) == sampler

        run = small.fit(sampler=sampler, steps=3)
        assert run.ledger.steps == 3
        # Without sampling three steps cost as much as one with the noise of one over √3.
        once = epsilon(
            2.0 / 3**0.5, steps=1, delta=small.DELTA, sampling_rate=1.0, accountant="rdp"
        )
        assert run.history[-1]["epsilon"] == pytest.approx(once)
    finally:
        SAMPLERS.pop("whole", None)
