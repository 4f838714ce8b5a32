"""`python -m ovtq COMMAND …`: what `ovtq COMMAND …` does, where no scripts are on the path."""

import sys

from ovtq.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
