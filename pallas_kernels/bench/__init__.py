"""Timings of the operators against the roofline of the device: `python -m pallas_kernels.bench --help`."""
