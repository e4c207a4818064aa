"""Timing the operators against eager PyTorch, torch.compile and what else is installed."""
