"""The pages of the documentation that are made of the code when the site is built."""

import logging
import os

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
for name in ("torchao", "torch.utils._pytree"):  # which warn of missing parts as soon as they are imported
    logging.getLogger(name).setLevel(logging.ERROR)
