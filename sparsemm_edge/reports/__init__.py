"""Plots (PNG) and HTML reports. Everything that is drawn is drawn here, with matplotlib."""
