"""OpenVINO graphs and model folders."""
