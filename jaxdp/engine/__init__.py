"""How `jaxdp.PerSampleGrads` answers: one file per lowering, one rule type for all of them."""
