"""Devices, this machine, and the known defects of their runtimes."""
