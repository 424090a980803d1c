"""report.html and the comparison's page."""
