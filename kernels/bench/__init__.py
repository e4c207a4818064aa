"""Benchmarks of the operators against eager PyTorch, torch.compile and installed libraries."""
