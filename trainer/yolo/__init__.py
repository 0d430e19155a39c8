"""A detector of frames in the layout of YOLO: drawn scenes, network, training, calibration."""
