"""Calculations, not measurements: a roofline of the device and the bytes that kernels move."""
