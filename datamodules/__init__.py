"""Shards in, batches out: readers, writers and the built-in data."""
