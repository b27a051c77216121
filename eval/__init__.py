"""Metrics, extractors, latency and reports."""
