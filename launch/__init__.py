"""Starts training on Cloud TPU VMs, GKE, Slurm and one host of GPUs; the standard library is all that it needs.

One TOML file describes a cluster (`launch/clusters/`), and the command line names the run: `docs/launch.md`.
"""
