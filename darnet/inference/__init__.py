"""The networks as scoring runs them: one interface, and a backend of torch or of OpenVINO behind it."""
