"""`python -m jobs.bench`: `flamingo bench` with nothing but torch, triton and the standard library."""

import sys

from jobs.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
