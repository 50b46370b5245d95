"""What eviction gives on this machine: memory and speed, measured side by side, and what fits."""
