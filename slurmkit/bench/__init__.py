"""Measurements of the trainer: what `slurmkit bench` starts, each in processes of its own."""
