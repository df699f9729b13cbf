"""`python -m diffkd.cli`, for launchers that start a module."""

from diffkd.cli import main

if __name__ == "__main__":
    main()
