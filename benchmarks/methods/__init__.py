"""Every method of the comparison, against one training loop (`benchmarks.training`)."""
