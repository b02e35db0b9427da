"""``python -m grd`` is the command ``grd``."""

from grd.interfaces.cli.main import main

if __name__ == "__main__":
    main()
