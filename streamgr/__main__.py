"""`python -m streamgr`: the same as the `streamgr` command."""

from streamgr.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
