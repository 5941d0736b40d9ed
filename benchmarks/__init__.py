"""Measurements that compare the project with its peers; run from the repository's root."""
