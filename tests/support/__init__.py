"""How the tests run on several ranks: as threads, under mpiexec, and under torchrun."""
