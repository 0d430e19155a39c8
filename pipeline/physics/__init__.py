"""The imaging model: one description of the sensor for generator, networks, bounds and scores.

`psf`, `noise`, `measurement`, `bounds` and `grid` are written against the array API: they take
numpy arrays and torch tensors alike (on any device, through autograd) and return the same kind.
"""
