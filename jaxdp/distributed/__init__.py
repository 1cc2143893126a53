"""The same road across devices and hosts.

Under `jit` a batch that is spread over devices needs nothing: gradients are computed where their
rows lie, added up once, and noise is drawn once. One line tells `training.fit` to spread it:

    sharding = jaxdp.distributed.data_parallel()        # over all devices of all processes
    run = training.fit(..., sharding=sharding)

Inside a `jax.shard_map` or `jax.pmap` of your own, `all_reduce` stands behind the clip:

    tx = optax.chain(jaxdp.clip_flat(1.0), jaxdp.distributed.all_reduce("data"),
                     jaxdp.add_noise(1.1, key), optax.scale(1 / 256), optax.adam(1e-3))
"""

from jaxdp.distributed.agreement import check_agreement as check_agreement
from jaxdp.distributed.agreement import shared_seed as shared_seed
from jaxdp.distributed.all_reduce import all_reduce as all_reduce
from jaxdp.distributed.cluster import join as join
from jaxdp.distributed.exchange import exchanged as exchanged
from jaxdp.distributed.lost import ProcessLost as ProcessLost
from jaxdp.distributed.rows import data_parallel as data_parallel
from jaxdp.distributed.rows import spread_rows as spread_rows
from jaxdp.distributed.rows import spread_state as spread_state
