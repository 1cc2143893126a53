"""Training: a train state, a jitted step, a loop with a budget, checkpoints and logs.

Everything here is optional; the pieces of `jaxdp` work in a loop of your own. The whole road:

    sampler = jaxdp.PoissonSampler(60_000, expected_batch_size=256)
    tx = optax.chain(
        jaxdp.clip_flat(1.0),
        jaxdp.accumulate(optax.chain(
            jaxdp.add_noise(1.1, jaxdp.random_key()),
            optax.scale(1 / sampler.expected_batch_size),
            optax.adam(1e-3))))
    step = training.make_step(jaxdp.per_sample_grads(loss_fn), tx)
    run = training.fit(training.init(params, tx), step, sampler, (images, labels),
                       steps=10_000, delta=1e-5, budget=3.0)
"""

from jaxdp.training.budget import Budget as Budget
from jaxdp.training.checkpoints import Checkpoints as Checkpoints
from jaxdp.training.loop import fit as fit
from jaxdp.training.run import Run as Run
from jaxdp.training.run import run_of as run_of
from jaxdp.training.step import Step as Step
from jaxdp.training.step import StepMetrics as StepMetrics
from jaxdp.training.step import TrainState as TrainState
from jaxdp.training.step import init as init
from jaxdp.training.step import make_step as make_step
