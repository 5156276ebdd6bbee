"""What ``from transmla.verify import …`` gives: see docs/reference/python-api.md."""

from transmla.verify.report import Verification
from transmla.verify.run import verify

__all__ = ["Verification", "verify"]
