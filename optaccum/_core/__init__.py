"""The algorithm: what happens to a microbatch that has passed every check."""
