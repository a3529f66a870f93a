"""The instrument: FLOPs by component, latency by stage, memory by class, one record format for all."""
