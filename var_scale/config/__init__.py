"""Typed configuration: schema of every YAML, loading, presets, overrides. Never imports torch."""
