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
   gradients of each leaf from what was found there.
5. The lowerings: `slots` (one pass), `taps` (two passes), `fused` (per-layer rules), `dense`
   (`vmap(grad)`, which knows nothing of the above). `batches` applies one to a batch, `sharded`
   to one that lies on several devices; `lowerings` chooses one, `explanation` tells what it does.
6. `rule` turns norms into weights for all of them. `settle` and `numerics` keep samples that are
   not finite, and rounding, out of the sums.
"""
