"""DARNet: dual-attention 3D ResNet18 for chest CT, as a batch job on a Ray cluster. Research use only."""

__version__ = "0.1.0"
