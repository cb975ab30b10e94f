"""Host memory: the arena, leases of it, and the kernels' reference."""
