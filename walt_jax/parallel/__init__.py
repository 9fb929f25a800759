"""Many devices, and none: the mesh and the table of rules that divides arrays over it; what programs cost."""
