"""`python -m fieldsmith` is the command line."""

from fieldsmith.cli import main

raise SystemExit(main())
