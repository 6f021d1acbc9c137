"""``python -m alignkit.demo``."""

import sys

from alignkit.demo.run import main

sys.exit(main())
