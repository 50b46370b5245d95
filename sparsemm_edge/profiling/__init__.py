"""Measure memory and speed with and without eviction on this machine, and compute what fits."""
