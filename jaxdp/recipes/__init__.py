"""Ready-made pieces that the command line, the demo and the benchmarks share."""
