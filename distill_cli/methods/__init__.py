"""The methods: one room each, with its options (config.py, no torch) and its objective."""
