"""Resolve closely-spaced infrared targets in real time: the part that runs beside the sensor."""
