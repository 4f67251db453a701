"""The command line: one small file a command; the only place that composes everything."""
