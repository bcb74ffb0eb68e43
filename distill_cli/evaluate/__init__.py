"""Quality of images: distances in a classifier's features, CLIP score, reports, and the search for times."""
