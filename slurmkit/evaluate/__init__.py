"""Whether training helped: a checkpoint beside a baseline, on an environment's held-out tasks and on BFCL v3."""
