"""Power, clocks and energy of devices, sampled while a program runs."""
