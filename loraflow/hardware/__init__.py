"""Devices, process groups and the choice of attention kernels."""
