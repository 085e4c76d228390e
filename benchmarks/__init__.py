"""``make bench``: flora beside its peers, one layer at a time, in one process."""
