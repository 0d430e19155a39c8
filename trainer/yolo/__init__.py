"""A detector of whole frames in the layout of YOLO: drawn scenes, network, training, calibration."""
