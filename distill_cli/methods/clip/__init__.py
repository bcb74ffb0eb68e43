"""Training of CLIP models (Radford et al. 2103.00020), which score pictures by their captions."""
