"""The mathematics of diffusion: schedules, denoisers, guidance, solvers, losses. Torch only, no I/O."""
