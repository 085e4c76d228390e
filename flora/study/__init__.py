"""``python -m flora study``: does a delta that keeps its weight's N-D structure pay? Runs, their store, the report."""
