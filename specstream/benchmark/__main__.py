"""`python -m specstream.benchmark`."""

from specstream.benchmark.command import main

if __name__ == "__main__":
    raise SystemExit(main())
