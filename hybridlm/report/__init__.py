"""What `hybridlm report` makes of run folders: tables, plots and one HTML page."""
