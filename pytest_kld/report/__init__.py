"""Reports, made from GateResults alone."""
