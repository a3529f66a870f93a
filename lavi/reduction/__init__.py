"""Fewer visual tokens, before any fusion: one file a method, all behind one contract (base.py)."""
