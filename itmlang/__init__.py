"""The itm language: its compiler and its meaning. Pure: no sockets, no clock, no randomness."""

__version__ = "0.1.0"  # the only place that says it
