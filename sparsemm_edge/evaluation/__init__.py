"""Accuracy under eviction: data sets, metrics, settings, runs and reports."""
