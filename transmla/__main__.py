"""``python -m transmla``: the same program as the ``transmla`` command."""

from transmla.cli.app import main

if __name__ == "__main__":
    main()
