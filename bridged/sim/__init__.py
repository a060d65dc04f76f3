"""A simulated STM32 with its ROM loader: in memory with virtual time, or on a pty in real time."""
