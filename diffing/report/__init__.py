"""The report of a run: one HTML page and one JSON file."""
