"""The forms in which per-sample gradients are kept: one file each.

A factor knows arrays and boxes of a leaf; of equations and of parameters it knows nothing.
"""
