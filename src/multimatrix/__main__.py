"""`python -m multimatrix` is the command line."""

from multimatrix.cli import main

if __name__ == "__main__":
    main()
