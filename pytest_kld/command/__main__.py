"""Runs the command as `python -m pytest_kld.command`."""

import sys

from pytest_kld.command import main

sys.exit(main())
