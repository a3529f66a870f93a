"""Metrics, one file a family, as torchmetrics Metrics."""
