"""Attention that keeps all pairs of tokens on the chip: for TPUs and for GPUs."""
