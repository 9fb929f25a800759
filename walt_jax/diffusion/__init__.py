"""Gaussian diffusion as pure functions of arrays: schedules, parameterisations, objectives, guidance, samplers."""
