"""How vision meets language: one file a method, all behind one contract (base.py)."""
