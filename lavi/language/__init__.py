"""Language models: loading, and the surgery that lets a fusion in."""
