"""The command line: one short file a subcommand. Torch is imported only inside function bodies."""
