"""Reports: plain-text tables, plots, and a run's HTML page."""
