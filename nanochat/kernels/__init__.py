"""Fused operations, each beside a plain PyTorch twin that defines it."""
