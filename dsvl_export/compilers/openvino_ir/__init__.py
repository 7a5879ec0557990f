"""OpenVINO IR: debug builds, and single layers."""
