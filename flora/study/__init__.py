"""``python -m flora study``: does a delta that keeps the weight's N-D structure pay? Runs, their store and the report."""
