"""How right answers stay when the cache shrinks: data sets, metrics, settings, the run and its report."""
