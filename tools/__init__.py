"""Scripts that generate pages of docs/; not installed."""
