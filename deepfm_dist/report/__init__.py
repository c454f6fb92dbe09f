"""What people look at: tables in plain text, plots, the page of a run."""
