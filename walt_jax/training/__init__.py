"""A run is a list of stages: each a task, data, a step count and an optimizer, starting from the stage before."""
