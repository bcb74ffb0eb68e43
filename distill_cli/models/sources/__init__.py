"""Where models come from: built-in ones, the hub, published files, single files."""
