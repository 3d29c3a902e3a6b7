"""`python -m avss`: the command, where it is not on the path."""

from avss.cli.main import main

if __name__ == "__main__":
    main()
