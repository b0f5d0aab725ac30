"""Benchmarks of optaccum against the other ways of accumulating gradients."""
