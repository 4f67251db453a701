"""An overlay at work, without sockets or a clock: what is sent and received, measured and chosen.

`wire` makes and reads probes, `paths` measures a path and chooses among several, `engine` puts
both together for all destinations of an overlay. The process that owns the sockets tells the
engine what happened and when, and does what comes back.
"""
