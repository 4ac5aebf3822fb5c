"""``python -m featherbed.cli``."""

from featherbed.cli import main

main()
