"""Pictures of the process: how noise is added to data, and how a model makes samples of noise."""
