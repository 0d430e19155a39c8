"""How well targets are detected: on pictures with masks, and on recordings with truth."""
