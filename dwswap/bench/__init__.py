"""Measuring: timing that agrees with the hardware, and records of it."""
