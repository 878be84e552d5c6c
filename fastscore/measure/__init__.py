"""Measuring fastscore: named workloads, timing in turn, provenance, result files, verdicts."""
