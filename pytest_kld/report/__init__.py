"""Reports: drawn from GateResults, nothing else."""
