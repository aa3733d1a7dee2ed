# SPDX-License-Identifier: Apache-2.0
"""`python -m vtprune` is the command `vtprune`."""

import sys

from .cli.main import main

sys.exit(main())
