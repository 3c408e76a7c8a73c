"""What predictions are worth: measures with intervals, comparisons, maps held against the truth, reports."""
