"""Decisions as pure functions: no I/O, no clock, no state. The loops elsewhere act on them."""
