"""The parts of `optaccum.testing`: structure, numbers, whole steps, and the report on them."""
