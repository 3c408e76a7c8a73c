"""DARNet: dual-attention 3D ResNet18 for chest CT, as a batch job on a Ray cluster. Research use only."""

__version__ = "0.1.0"
RESEARCH_USE = "Research use only"  # where there is room for a few words alone, as in a figure
NOTICE = f"{RESEARCH_USE}. Not a medical device: no decision about a patient may rest on it."
