"""`python -m distill_cli`, also what torchrun and accelerate start."""

from distill_cli.cli.app import main

if __name__ == "__main__":
    main()
