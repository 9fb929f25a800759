"""Metrics with their protocols, the judge of drawn clips, and the report."""
