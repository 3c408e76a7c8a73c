"""The results table as a shared place: rows, runs, gates, and the one put that makes a night visible."""
