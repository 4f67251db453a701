"""The itm language: its compiler and its meaning. Pure: no sockets, no clock, no randomness."""
