"""How `jaxdp.PerSampleGrads` answers.

The loss of ONE example is traced once, and vmapped only afterwards: no batch axis has to be
inferred, and samples cannot mix as long as every equation only computes. From the program of the
loss:

1. `walker` reads programs; the only module that knows JAX's internals. `liveness` and `twins` tell
   which equations are needed, and which values have one cotangent. `effects` refuses what does more
   than compute on one example, `batch_of_one` finds what is left of statistics over a batch.
2. `uses` finds where each parameter meets the sample, `views` which parameter that is, and `boxes`
   which entries of it; `plan` holds them.
3. `kinds/` has one file per kind of site: which primitives it knows, and of what its gradients are
   made. `factors/` has one file per form that these are kept in: how norms, sums and rows come from
   it.
4. `instrument` runs the program with a slot or a tap at every use, and `assemble` makes the
   gradients of each leaf from what was found there; `explanation` tells how.
5. `methods/` has one file per method: `slots` (one pass), `taps` (two passes), `fused` (per-layer
   rules), `dense` (`vmap(grad)`, which knows nothing of the above), and `choice`, which takes one.
   `microbatches` applies one to a few samples at a time, `sharded` to a batch that lies on several
   devices.
6. `weighting` turns norms into weights for all of them. `methods/settle` and `numerics` keep
   samples that are not finite, and rounding, out of the sums.
"""
