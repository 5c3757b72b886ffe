"""`python -m tokendial.cli COMMAND`, the form that launchers of many processes take."""

from tokendial.cli import main

main()
