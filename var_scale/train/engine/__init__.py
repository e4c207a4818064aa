"""Engines: what carries a training step out."""
