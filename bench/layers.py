"""Claim: a layer of `jaxdp.nn` costs at most 1.15 times as much with clipped gradients as without.

    python bench/layers.py [--layers lstm conv2d] [--contestants ...]
    python bench/layers.py --markdown bench/results/layers_cpu.json

Each layer stands where it stands in a network: between a loss and a layer below that wants the
gradient of its input, here that of one scale for each feature of the batch. Time and temporary
memory of a compiled step, as ratios to the gradient of the mean loss; everything else is as in
`bench/engine.py`, whose contestants take part.
"""
